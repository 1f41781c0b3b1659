# Sourced by launch.sh where HOSTFILE is set: the same command on each host, by ssh, and their end.
# HOSTFILE: lines "name slots=N", N cards each, the same on all; comments after #. The folder must be the same on all hosts.

[ -f "$HOSTFILE" ] || die "$HOSTFILE: no such host file; expected lines such as: machine1 slots=2"
names=() slots=
while read -r name more; do
    [[ -n $name ]] || continue
    [[ $more =~ ^slots=([1-9][0-9]*)$ ]] || die "$HOSTFILE: '$name $more', expected a line such as: machine1 slots=2"
    [ "${slots:-${BASH_REMATCH[1]}}" = "${BASH_REMATCH[1]}" ] || die "$HOSTFILE: $name has ${BASH_REMATCH[1]} slots, others $slots; expected the same on all"
    slots=${BASH_REMATCH[1]}
    names+=("$name")
done < <(sed 's/#.*//' "$HOSTFILE")
[ ${#names[@]} -gt 0 ] || die "$HOSTFILE: names no host; expected lines such as: machine1 slots=2"

printf -v there '%q ' bash "$here/launch.sh" "$@" --num_gpus "$slots"
pids=()
for i in "${!names[@]}"; do
    # -tt: when this ends, so does the session there, and launch.sh stops in good order
    ssh -tt "${names[$i]}" "cd $(printf %q "$PWD") && HOSTFILE= NNODES=${#names[@]} NODE_RANK=$i MASTER_ADDR=${MASTER_ADDR:-${names[0]}} MASTER_PORT=${MASTER_PORT:-29500} $there" < /dev/null &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM HUP
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    wait "$pid" || code=$?
done
exit "$code"
