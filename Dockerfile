# Ubuntu with this project and its environment. The driver is the host's: nothing of CUDA is installed but torch's own.
#
#   docker build -t diffusion-dpo .
#   docker run --rm --gpus all diffusion-dpo --check
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/project/runs" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       diffusion-dpo ds_configs/zero3_offload_4080.json
FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /project
# For a driver below 580: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 ...
ARG TORCH_INDEX=
COPY requirements.txt ./
RUN python3 -m venv .venv \
    && if [ -n "$TORCH_INDEX" ]; then .venv/bin/pip install --no-cache-dir "torch>=2.11,<=2.13.0" --index-url "$TORCH_INDEX"; fi \
    && .venv/bin/pip install --no-cache-dir -r requirements.txt
COPY . .
# CPU Adam is compiled for the processor of the machine that builds (-march=native).
RUN bash launch.sh --setup
ENTRYPOINT ["bash", "launch.sh"]
CMD ["--help"]
