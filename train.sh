#!/usr/bin/env bash
''':'   # bash reads on. `torchrun train.sh` starts Python here, which goes to the last lines.
# Polychromic LoRA, the whole study: a base model if none is given; SFT four ways (plain, with D,
# GEM, BA-LoRA), GRPO after the first two, Pass@k training; evaluation, report. Commands are shown.
#   torchrun train.sh                 the toy task, from nothing: 10 to 15 minutes on 2 cores
#   bash train.sh                     the same (NPROC=2 bash train.sh: two processes)
#   torchrun --nproc-per-node=8 train.sh --model Qwen/Qwen3-8B --data posts.jsonl     the full study
#   python study.py list              the larger studies, other toy tasks, a small model on a CPU
#
#   --model NAME       Qwen3 checkpoint, a folder or a hub name (default: a small one is made)
#   --data FILE        posts, as python data.py check takes them (convert makes them of other files)
#   --out FOLDER       for runs and report (default: runs/ and the data's name)
#   --seeds "1 2 3"    the default; with --model "1". --jobs N: so many of them side by side
#   --diversity NAME   D of the polychromic arms: dpp, the best measured, or cosine, the plain form
#   --posts N, --steps BOTH or SFT,GRPO, --base-steps N, --samples N, --reward, --reward-model,
#   --embedder, --domain, --skip-bad-lines, --nf4, --shard, --micro-tokens, --max-rows,
#   --max-new-tokens, --allow-code-execution [as-root]: as the programs' --help says
#   --dry-run          each command's cost, and the total; fetches no weights, leaves nothing behind
# A stage that is done is skipped, an interrupted one resumes: after a crash, the same again.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)" python="${STUDY_PYTHON:-python}"
fail() { [[ "${RANK:-0}" != 0 ]] || echo "error: train.sh: $*" >&2; exit 2; }
model="" data=pocket out="" seeds="" jobs="" diversity=dpp posts="" steps="" samples="" domain=""
base_steps="" reward=auto reward_model="" embedder=base micro_tokens="" max_rows="" dry="" bad=""
max_new_tokens="" everywhere=() given=("$@")
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h|--help) [[ "${RANK:-0}" != 0 ]] || sed -n '3,/^set/s/^# \{0,1\}//p' "$here/train.sh"; exit ;;
    --dry-run) dry=1 ;; --skip-bad-lines) bad="$1" ;;
    --nf4|--shard|--allow-code-execution|as-root) everywhere+=("$1") ;;
    --study) fail "the larger studies are run by: python study.py run ${2:-NAME}" ;;
    --model|--data|--out|--seeds|--jobs|--diversity|--posts|--steps|--base-steps|--samples|\
    --reward|--reward-model|--embedder|--domain|--micro-tokens|--max-rows|--max-new-tokens)
      [[ $# -ge 2 ]] || fail "$1 needs a value: see --help"
      name="${1#--}"; printf -v "${name//-/_}" '%s' "$2"; shift ;;
    *) fail "unknown argument $1: see --help" ;;
  esac
  shift
done
[[ -z "$model" || "$data" != pocket ]] || fail "--model needs --data FILE, the posts to train on"
[[ -f "$data" || "$data" == pocket ]] || fail "there is no file $data: give --data a file of posts"
[[ -n "$model" || "$data" == pocket ]] || fail "without --model: study.py run posts --data '$data'"
[[ -n "$model" || ! "${everywhere[*]-}" =~ nf4|shard ]] || fail "--nf4 and --shard need --model"
[[ "$steps" =~ ^([0-9]+(,[0-9]+)?)?$ ]] || fail "--steps $steps: one number, or two with a comma"
[[ "$posts,$samples" =~ ^([1-9][0-9]+)?,([1-9][0-9]+)?$ ]] || fail "--posts, --samples: 10 or more"
[[ "$diversity" =~ ^(dpp|cosine)$ ]] || fail "--diversity $diversity: dpp or cosine"
source "$here/support/launch.sh"         # start under torchrun; run, plan, side_by_side

# ---- Settings: a language model, or the toy task with a small base -------------------------------
sft_steps="${steps%,*}" grpo_steps="${steps#*,}" split="$bad ${domain:+--domain $domain}" faster=""
if [[ -n "$model" ]]; then
  seeds="${seeds:-1}" n="${posts:-2500}" samples="${samples:-20}" tokens="${max_new_tokens:-100}"
  sizes="sft=$n,grpo=$n,eval=$(( n < 2500 ? n / 5 : 500 ))"
  [[ -n "$posts" ]] || split+=" --fit"   # parts of a smaller file are smaller
  batch=$(( WORLD_SIZE > 16 ? WORLD_SIZE : 16 )) drafting=$(( WORLD_SIZE > 8 ? WORLD_SIZE : 8 ))
  sft="--rank 16 --alpha 16 --lr 2e-4 --batch $batch --steps ${sft_steps:-0}"
  sft+=" --draft-posts $drafting"        # every rank has a post
  grpo="--lr 2e-5 --batch $batch --steps ${grpo_steps:-0}"
  D="--lambda-share 0.3 --gate likelihood" D_grpo="--diversity-share 1 --gate auto"
  passk="--advantage maxk --set-size 4"
else
  seeds="${seeds:-1 2 3}" n="${posts:-1000}" samples="${samples:-24}" tokens="${max_new_tokens:-24}"
  sizes="base=$(( n * 5 )),sft=$n,grpo=$(( n * 2 )),eval=$(( n / 5 ))"
  split="--by intent --popularity 0.7 --writers 3 --permute"
  small="--steps ${base_steps:-600 --until 0.70 --schedule constant} --hidden 192 --layers 2"
  small+=" --heads 6 --lr 3e-3 --beta2 0.98 --warmup 20 --noise 0.2 --micro-tokens 1024"
  sft="--rank 16 --alpha 32 --lr 2e-3 --batch 32 --steps ${sft_steps:-40} --micro-tokens 1024"
  sft+=" --save-every 40"                # rates: the better of two for each (studies/rates.toml)
  grpo="--lr 1e-3 --batch 16 --steps ${grpo_steps:-120} --micro-tokens 2048 --save-every 40"
  D="--lambda 0.3 --gate verifier" D_grpo="--diversity-share 6 --gate verifier" faster="--lr 4e-3"
  [[ "$diversity" == dpp ]] || D_grpo="--diversity-weight 8 --gate verifier"
  passk="--advantage passk --set-size 6" everywhere+=(--dtype float32)  # bfloat16 is too coarse
fi
fit="${micro_tokens:+ --micro-tokens $micro_tokens}" && sft+="$fit" grpo+="$fit"
poly=poly-dpp poly_grpo=dpp-grpo rate="$faster"
[[ "$diversity" == dpp ]] || { poly=poly poly_grpo=poly-grpo rate=""; }
arms=(lora "$poly" sft-gem sft-ba-lora lora-grpo "$poly_grpo" lora-passk) reported=()
judge=(--reward "$reward" ${reward_model:+--reward-model "$reward_model"} --embedder "$embedder")

# ---- One seed: data, base model, SFT, GRPO, evaluation -------------------------------------------
one_seed() {
  local R="$out/seed$1" base="$model" dir="$out/seed$1/data" split_seed="$1" arm measured=()
  [[ -z "$model" ]] || dir="$out/data" split_seed=0        # a file has one split for all seeds
  run data.py split --data "$data" --sizes "$sizes" $split --seed "$split_seed" --out "$dir"
  if [[ -z "$model" ]]; then                               # a small Qwen3 from nothing
    base="$R/base-model/model"
    run polylora.py base --data "$dir/base.jsonl" --out "$R/base-model" --seed "$1" --resume $small
  fi
  local held=(--model "$base" ${everywhere[@]+"${everywhere[@]}"} ${max_rows:+--max-rows $max_rows})
  local common=("${held[@]}" --seed "$1" --max-new-tokens "$tokens")
  local SFT=(polylora.py sft --data "$dir/sft.jsonl" "${common[@]}" --resume $sft)
  local GRPO=(grpo.py --data "$dir/grpo.jsonl" "${common[@]}" --resume $grpo --k 8 "${judge[@]}")
  [[ -n "$dry" || -z "$model" ]] ||        # does the embedder, and so D, see what people see?
    run evaluate.py embedder "$dir/sft.jsonl" "${held[@]}" --embedder "$embedder"
  run "${SFT[@]}" --out "$R/lora"                                    # standard LoRA
  run "${SFT[@]}" --out "$R/$poly" --k 8 --diversity "$diversity" $D $rate --embedder "$embedder"
  run "${SFT[@]}" --out "$R/sft-gem" --loss gem --k 8 $faster        # baselines: other losses
  run "${SFT[@]}" --out "$R/sft-ba-lora" --loss ba-lora --k 8 $faster
  run "${GRPO[@]}" --out "$R/lora-grpo" --start "$R/lora"            # plain in both phases
  run "${GRPO[@]}" --out "$R/$poly_grpo" --start "$R/$poly" --diversity "$diversity" $D_grpo
  run "${GRPO[@]}" --out "$R/lora-passk" --start "$R/lora" $passk    # baseline: Pass@k training
  [[ -n "$dry" ]] || for arm in "${arms[@]}"; do measured+=("$R/$arm"); done
  run evaluate.py measure --data "$dir/eval.jsonl" "${common[@]}" --n "$samples" "${judge[@]}" \
    --base-out "$R/base" ${measured[@]+"${measured[@]}"}
}

if [[ -n "$dry" ]]; then plan one_seed $seeds; exit; fi
side_by_side one_seed $seeds
for seed in $seeds; do
  for arm in base "${arms[@]}"; do reported+=("$out/seed$seed/$arm"); done
done
[[ "$RANK" != 0 ]] || run evaluate.py report "${reported[@]}" --out "$out/report" \
  --against lora-grpo --primary "$poly_grpo" lora-passk
exit
'''
import os, sys
if os.getpgrp() != os.getpid():
    os.setpgid(0, 0)
os.environ |= {"STUDY_PYTHON": sys.executable, "STUDY_GROUP": "own"}
os.execvp("bash", ["bash", "-c", open(__file__).read(), *sys.argv])  # may be edited while it runs
