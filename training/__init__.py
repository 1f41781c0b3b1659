"""What a training run is made of: DeepSpeed's engine, memory, checkpoints, checks, trackers, the run's folder."""

import os

# torch.cuda.is_available() asks the CUDA runtime. DeepSpeed's import would have it ask NVML, which also counts cards
# that the runtime cannot use because the driver is too old (training/cards.py).
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
