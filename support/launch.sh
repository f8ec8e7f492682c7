# Sourced by train.sh: the start under torchrun, a command, seeds side by side, the end, a plan.
# Every rank of a launch runs this; only rank 0 prints. The bash of macOS, 3.2, will do.

if [[ -z "${RANK:-}" || -z "${WORLD_SIZE:-}" ]]; then        # one alone is a leftover
  command -v torchrun > /dev/null || fail "no torchrun on the PATH: activate torch's environment"
  exec torchrun --standalone --nproc-per-node="${NPROC:-1}" "$here/train.sh" \
    ${given[@]+"${given[@]}"}
fi
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
(( gpus == 0 || ${LOCAL_WORLD_SIZE:-1} <= gpus )) ||
  fail "${LOCAL_WORLD_SIZE:-1} ranks for $gpus GPUs: start torchrun --nproc-per-node=$gpus"
# Several processes share the cores: each has one thread.
(( gpus > 0 )) || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
name="${data##*/}"
real_out="${out:-runs/${name%%.*}}"
out="$real_out${dry:+-dry-run}"           # a dry run's folder is removed again

stage=0
run() {  # PROGRAM WORD..: print a command so that it can be pasted, and run it
  local status=0 shown=python word
  # Ranks meet in a store that a launch's stages share: each stage has a name of its own.
  export STUDY_STAGE="$(( ++stage ))"
  for word in "$@"; do                    # as it would run: a dry run's folder is not the real one
    [[ "$word" != "$out"* ]] || word="$real_out${word#"$out"}"
    shown+="$(printf ' %q' "$word")"
  done
  [[ "$RANK" != 0 ]] || echo "$shown"
  case "$1 $2" in
    "data.py split") ;;                                       # nothing is trained
    *) [[ -z "$dry" ]] || set -- "$@" --dry-run ;;
  esac
  "$python" "$here/$1" "${@:2}" || status=$?
  (( status == 0 )) || {
    echo "train.sh: rank $RANK: $1 ended with exit code $status; to repeat it alone: $shown" >&2
    exit "$status"
  }
  # A dry run's later stages need some base: one of a single step.
  [[ -z "$dry" || "$1 $2" != "polylora.py base" ]] ||
    STUDY_STAGE="$stage-again" "$python" "$here/$1" "${@:2:$#-2}" --steps 1 > /dev/null
}

end() {  # STATUS: end what still runs in this process group, other seeds' programs too, and exit
  trap '' TERM INT
  [[ -z "${STUDY_GROUP:-}" ]] || kill -TERM 0
  wait
  exit "$1"
}
trap 'end 143' TERM
trap 'end 130' INT
# A dry run leaves nothing behind, however it ends.
[[ -z "$dry" || "$RANK" != 0 ]] || trap 'rm -rf "$out"' EXIT

side_by_side() {  # FUNCTION SEED..: FUNCTION for every seed, some at a time; a failure ends all
  local function="$1" going="" left="" number=0 limit pid seed
  shift
  limit="$(jobs_for "$@")"
  for seed in "$@" ""; do                 # the last one waits for all
    [[ -n "$seed" ]] || limit=1
    while (( $(wc -w <<< "$going") >= limit )); do
      sleep 0.3
      left=""
      for pid in $going; do
        if kill -0 "$pid" 2> /dev/null; then left+=" $pid"; else wait "$pid" || end "$?"; fi
      done
      going="$left"
    done
    [[ -n "$seed" ]] || break
    (
      trap : TERM INT                     # the program in front is told too, and saves first
      if (( gpus > 1 && WORLD_SIZE == 1 )); then             # seeds take turns on the GPUs
        IFS=, read -ra cards <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $(( gpus - 1 )))}"
        export CUDA_VISIBLE_DEVICES="${cards[number % gpus]}"
      fi
      "$function" "$seed"
    ) &
    going+=" $!"
    number=$(( number + 1 ))
  done
}

jobs_for() {  # SEED..: how many side by side: as GPUs or cores; three on two cores all at once
  local places=$(( (gpus > 0 ? gpus : $(getconf _NPROCESSORS_ONLN)) / WORLD_SIZE ))
  (( places > 0 )) || places=1
  (( gpus > 0 || WORLD_SIZE > 1 || $# <= places || $# >= 2 * places )) || places="$#"
  echo "${jobs:-$places}"
}

plan() {  # FUNCTION SEED..: the commands of one seed with their costs, and what all seeds take
  local function="$1" limit cores
  shift
  limit="$(jobs_for "$@")"
  cores="$(getconf _NPROCESSORS_ONLN)"
  "$function" "$1" | awk -v runs="$(( ${#arms[@]} + 1 ))" \
    -v rounds="$(( ($# + limit - 1) / limit ))" \
    -v crowd="$(( gpus == 0 && limit > cores ? limit : cores ))" -v cores="$cores" '
    { print }
    /^plan / { plans += 1 }
    /^plan measure/ { total += runs * $(NF - 1); next }   # its time is that of one run
    /^plan / { total += $(NF - 1) }
    END { total *= crowd / cores
          if (plans) printf "The whole study: about %.0f minutes (%d x %.0f s)\n",
                            rounds * total / 60, rounds, total }'
}
