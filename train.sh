#!/usr/bin/env bash
''':'  # bash reads on; `torchrun train.sh` starts python here, which goes straight to the last line
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() { cat <<END
The whole study: base model, SFT (plain and polychromic), GRPO from each, Pass@k training, one report.

  torchrun train.sh                    the pocket study, from nothing: 2 cores, about ten minutes
  torchrun train.sh --data FILE        the same on your posts with replies by voice; makes a small base from some of them
  torchrun --nproc-per-node=8 train.sh --model Qwen/Qwen3-8B --data posts.jsonl      the full study on 8 GPUs
  bash train.sh                        as torchrun train.sh (NPROC=2 bash train.sh: two processes)

  --model NAME       Qwen3 checkpoint, folder or hub name (default: a pocket model made on the spot)
  --data FILE        posts, JSON lines or .gz (default: the pocket world, made by data.py)
  --out FOLDER       where runs and report go (default: runs/pocket, or runs/ and the data's name)
  --seeds "1 2"      seeds of the study (default: "1 2"; with --model "1")
  --lambda X         weight of D in the polychromic SFT phase
  --weight X         weight of D in the polychromic GRPO phase
  --posts N          posts of each phase (default: 1000; with --model 2500)
  --steps N          optimizer steps of SFT and GRPO each (default: 120 and 80; with --model one pass over the posts)
  --base-steps N     optimizer steps that make the small base (default: 800; with --data 1200)
  --reward NAME      reward of GRPO with --model: auto, relevance, model, judge (default: auto)
  --reward-model M   Qwen3 folder or hub name for --reward model or judge
  --embedder NAME    what embeds drafts for D: base, or a Qwen3-Embedding folder or hub name (default: base)
  --nf4              with --model: the frozen weights in 4 bits, a third of the memory
  --shard            with --model: the frozen weights spread over the ranks, for models larger than a GPU
  --jobs N           seeds worked on side by side without --model (default: one a core)

A stage that is done is not done again; an interrupted one goes on from its last checkpoint.
END
}

fail() { [[ "${RANK:-0}" != 0 ]] || echo "error: train.sh: $*" >&2; exit 2; }

model="" data="" out="" seeds="" lambda="" weight="" posts="" steps="" reward=auto reward_model="" embedder=base jobs="" base_steps="" held=()
given=("$@")
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h|--help) [[ "${RANK:-0}" != 0 ]] || usage; exit 0 ;;
    --model|--data|--out|--seeds|--lambda|--weight|--posts|--steps|--base-steps|--reward|--reward-model|--embedder|--jobs)
      [[ $# -ge 2 ]] || fail "$1 needs a value: see --help"
      flag="${1#--}"; printf -v "${flag//-/_}" '%s' "$2"; shift 2 ;;
    --nf4|--shard) held+=("$1"); shift ;;
    *) fail "unknown argument $1: see --help" ;;
  esac
done
[[ -z "$model" || -n "$data" ]] || fail "--model needs --data FILE, the posts to train on"
[[ -n "$model" || ${#held[@]} == 0 ]] || fail "${held[0]} needs --model: the small world's base is made in full"
[[ -z "$data" || -f "$data" ]] || fail "there is no file $data: give --data a file of posts"
[[ -n "${RANK:-}" ]] || exec torchrun --standalone --nproc-per-node="${NPROC:-1}" "$here/train.sh" ${given[@]+"${given[@]}"}

# Settings. Those of the small worlds were chosen on seeds 101 and 102, which no report uses.
name="$(basename "${data:-pocket}")"; out="${out:-runs/${name%%.*}}"
if [[ -z "$model" ]]; then
  seeds="${seeds:-1 2}"; posts="${posts:-1000}"; lambda="${lambda:-0.3}"; weight="${weight:-0.7}"
  sizes="base=$(( posts * 5 )),sft=$posts,grpo=$posts,eval=$(( posts / 5 ))"
  if [[ -z "$data" ]]; then base_steps="${base_steps:-800}" noise=0.2; else base_steps="${base_steps:-1200}" noise=0.1; fi
  small=(--hidden 192 --layers 2 --heads 6 --lr 3e-3 --beta2 0.98 --warmup 20 --noise "$noise" --micro-tokens 1024)
  adapter=(--rank 16 --alpha 32)
  sft=(--lr 2e-3 --batch 32 --steps "${steps:-120}" --max-new-tokens 24 --micro-tokens 1024 --save-every 40)
  grpo=(--lr 1e-3 --batch 16 --steps "${steps:-80}" --max-new-tokens 24 --micro-tokens 2048 --save-every 40)
  gate=verifier; floor=3; length=24
  # One thread a process: on a machine without a GPU two busy processes of two threads each wait for each other.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"; passk=passk
  jobs="${jobs:-$(( $(getconf _NPROCESSORS_ONLN) / WORLD_SIZE ))}"
else
  seeds="${seeds:-1}"; posts="${posts:-2500}"; lambda="${lambda:-0.3}"; weight="${weight:-1}"; jobs=1
  sizes="sft=$posts,grpo=$posts,eval=$(( posts < 2500 ? posts / 5 : 500 ))"
  adapter=(--rank 16 --alpha 16)
  sft=(--lr 2e-4 --batch 16 --steps "${steps:-0}" --max-new-tokens 100 --checkpointing)
  grpo=(--lr 2e-5 --batch 16 --steps "${steps:-0}" --max-new-tokens 100 --checkpointing)
  gate=likelihood; floor=0; length=100; passk=maxk
fi
grpo+=(--k 8 --reward "$reward" ${reward_model:+--reward-model "$reward_model"} --embedder "$embedder")
judge=(--reward "$reward" ${reward_model:+--reward-model "$reward_model"} --embedder "$embedder")
poly=(--k 8 --gate "$gate" --embedder "$embedder")
[[ "$jobs" -ge 1 ]] || jobs=1

run() { local room="$1"; shift; python "$here/$room.py" "$@"; }

run data split --data "${data:-pocket}" --sizes "$sizes" --seed 0 --out "$out/data"
base="$model"
if [[ -z "$model" ]]; then
  OMP_NUM_THREADS="$jobs" run polylora base --data "$out/data/base.jsonl" --out "$out/base" --seed 0 --resume --steps "$base_steps" "${small[@]}"
  base="$out/base/model"
fi

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
arms="lora poly lora-grpo lora-passk poly-grpo"
study() {  # every arm of one seed, then the drafts of each for the held-out posts
  local to="$out/seed$1" seed="$1"
  local first=(--model "$base" --data "$out/data/sft.jsonl" --seed "$seed" --resume "${adapter[@]}" "${sft[@]}" ${held[@]+"${held[@]}"})
  local second=(--model "$base" --data "$out/data/grpo.jsonl" --seed "$seed" --resume "${grpo[@]}" ${held[@]+"${held[@]}"})
  run polylora sft "${first[@]}" --out "$to/lora"
  run polylora sft "${first[@]}" --out "$to/poly" --lambda "$lambda" "${poly[@]}"
  run grpo "${second[@]}" --start "$to/lora" --out "$to/lora-grpo"
  run grpo "${second[@]}" --start "$to/lora" --out "$to/lora-passk" --advantage "$passk" --set-size 4
  run grpo "${second[@]}" --start "$to/poly" --out "$to/poly-grpo" --diversity-weight "$weight" --gate "$gate" --gate-floor "$floor"
  run evaluate measure --model "$base" --data "$out/data/eval.jsonl" --bare "$to/base" --seed "$seed" "${judge[@]}" \
    ${held[@]+"${held[@]}"} --max-new-tokens "$length" $(for arm in $arms; do echo "$to/$arm"; done)
}

for seed in $seeds; do                    # `jobs` seeds at a time, side by side
  while (( $(jobs -rp | wc -l) >= jobs )); do wait -n; done
  study "$seed" & workers+=($!)
done
for worker in "${workers[@]}"; do wait "$worker"; done

if [[ "$RANK" == 0 ]]; then
  runs=()
  for seed in $seeds; do for arm in base $arms; do runs+=("$out/seed$seed/$arm"); done; done
  run evaluate report "${runs[@]}" --out "$out/report" --against lora-grpo
  echo "The report, with its pictures, is in $out/report. Try: python evaluate.py drafts $out/seed${seeds%% *}/poly-grpo \"some post\""
fi
exit
'''
import os, sys
os.execvp("bash", ["bash", *sys.argv])
