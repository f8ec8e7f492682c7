#!/usr/bin/env bash
''':'  # bash reads on; `torchrun train.sh` starts python here, which goes straight to the last lines
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

usage() { cat <<END
The whole study: base model, SFT (plain and polychromic), GRPO from each, Pass@k training, one report.

  torchrun train.sh                    the pocket study, from nothing: a quarter of an hour on 2 cores
  torchrun train.sh --data pocket-code        the same in another small world (or pocket-stories)
  torchrun train.sh --data FILE        the same on your posts with replies by voice; makes a small base
  torchrun --nproc-per-node=8 train.sh --model Qwen/Qwen3-8B --data posts.jsonl      the full study
  bash train.sh                        as torchrun train.sh (NPROC=2 bash train.sh: two processes)

  --model NAME       Qwen3 checkpoint, folder or hub name (default: a pocket model made on the spot)
  --data FILE        posts, JSON lines or .gz; or pocket-code or pocket-stories, small worlds as the default
                     one, pocket, is: all three are made by data.py
  --out FOLDER       where runs and report go (default: runs/pocket, or runs/ and the data's or study's
                     name; studies in one folder share the arms that are equal)
  --study NAME       one question, with arms and seeds of its own, for the small worlds:
                       primary      the default's arms over seeds 11 to 22
                       trials       how settings are chosen: four methods, six settings each, seeds 101, 102
                       rates        every line of the registers at two learning rates, seed 101
                       map          D in one phase or both, beside Pass@k or coverage, in sets, by other measures
                       cover        coverage with D (DPP) beside it, with and without distance, seeds 11 to 22
                       fresh        cover's two arms and Pass@k training once more, each at the temperature
                                    chosen for it, seeds 23 to 34
                       lambda       SFT at four weights of D, each with GRPO after it
                       full         LoRA and full fine-tuning at three learning rates each
                       losses, adapters, diversities, objectives      every line of that register, but
                                    full fine-tuning, which the study above has
                       controls     KL, entropy, clip-higher, less learning, fewer steps, D elsewhere
                       paths        every second phase of the default's, stopped at 20, 40 and 80 steps of 120
                       temperature  the default's arms and GEM, each measured at 0.5 to 1.6
                       free         what costs no training: other decoders of lora, half of lora-grpo's
                                    adapter, the adapter between the two
                       valid        the other reward: 1 for being right in any voice
                       few, noisy, blind   rollouts of 4; 15% of verdicts turned round; no verifier
                       valid-trials, blind-trials, noisy-trials, few-trials   how such studies' settings
                                    are chosen: each method's, and the registers' at two or three rates, seed 101
  --arms "A B"       arms to train, by the names in this file (default: lora poly lora-grpo lora-passk
                     lora-cover poly-grpo; with --model without coverage); an arm needs the arm that
                     it starts from. Trials: try-cover-4-at-1e-3 (method, its knob, rate)
  --seeds "1 2"      seeds of the study (default: "1 2 3"; of a --study "11 12 13 14 15"; with --model "1")
  --dry-run          print every stage with its command, posts, steps, memory and time; train nothing but a
                     small base's first step
  --lambda X         weight of D in the polychromic SFT phase (default: 0.3)
  --share X          with --model, instead: the norm of D's part of that phase's gradient over the
                     cross-entropy's (default: 0.3)
  --targets A,B      linear layers with LoRA (default: all seven)
  --weight X         weight of D in the polychromic GRPO phase (default: 8; 4 with --data; with --model D's
                     part of the advantages is held at the reward's own norm, gated by the verifier
                     where replies have voices, else by the reward)
  --narrow           with --data FILE: SFT's replies come from few voices, readers like all of them more
                     evenly and each intent's in an order of its own, as in the default world
  --posts N          posts of SFT; GRPO has as many, the pocket's twice, a small base five times (default:
                     1000; with --model 2500, on a CPU 1440 and 320)
  --steps N[,M]      optimizer steps of SFT, and of GRPO if that has others (default: 40,120; with --data
                     120,80; with --model one pass, on a CPU 90,20)
  --base-steps N     optimizer steps that make the small base, at most: the pocket's ends when it knows
                     enough (default: 600; with --data 1200, pocket-stories 500)
  --reward NAME      reward of GRPO, see grpo.py --help (default: auto)
  --reward-model M   Qwen3 folder or hub name for --reward model or judge
  --embedder NAME    what embeds drafts for D: base, or the folder or hub name of an embedding model
  --judge-embedder NAME   what embeds drafts when they are measured (default: as --embedder)
  --samples N        drafts for each held-out post (default: 24; of a --study 40; with --model 20)
  --temperatures "0.5 0.75"   also measure every arm at these, as ARM@T (default: none; of --study
                     temperature "0.5 0.75 1.25 1.6", of fresh 0.75)
  --allow-code-execution [as-root]   run drafts of code to judge them, in a sandbox (as root only when told)
  --nf4              with --model: the frozen weights in 4 bits, a third of the memory
  --shard            with --model: the frozen weights spread over the ranks
  --jobs N           seeds worked on side by side on a CPU (default: one a core; without --model all of them,
                     if they are fewer than two a core)

A stage that is done is not done again; an interrupted one goes on from its last checkpoint.
END
}

fail() { [[ "${RANK:-0}" != 0 ]] || echo "error: train.sh: $*" >&2; exit 2; }

model="" data="" out="" seeds="" lambda="" weight="" posts="" steps="" base_steps="" jobs=""
share="" targets="" dry="" reward=auto reward_model="" embedder=base judge_embedder="" samples="" held=() split=() until=() code=()
arms="" study="" narrow="" temperatures="" decoders="" endpoint="" k=8 set_size="" cover="" gate="" then_gate="" like="" passk="" extra=()
given=("$@")
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h|--help) [[ "${RANK:-0}" != 0 ]] || usage; exit 0 ;;
    --dry-run) dry=1; shift ;;
    --model|--data|--out|--study|--arms|--seeds|--lambda|--share|--targets|--weight|--posts|--steps|--base-steps|--reward|\
    --reward-model|--embedder|--judge-embedder|--samples|--temperatures|--jobs)
      [[ $# -ge 2 ]] || fail "$1 needs a value: see --help"
      flag="${1#--}"; printf -v "${flag//-/_}" '%s' "$2"; shift 2 ;;
    --allow-code-execution)
      code=(--allow-code-execution yes); shift
      [[ "${1:-}" != as-root ]] || { code=(--allow-code-execution as-root); shift; } ;;
    --nf4|--shard) held+=("$1"); shift ;;
    --narrow) narrow=-narrow; shift ;;
    *) fail "unknown argument $1: see --help" ;;
  esac
done
[[ -z "$model" || -n "$data" ]] || fail "--model needs --data FILE, the posts to train on"
[[ -n "$model" || ${#held[@]} == 0 ]] || fail "${held[0]} needs --model: the small world's base is made in full"
[[ -z "$share" || -n "$model" ]] || fail "--share needs --model: small worlds weigh D by --lambda"
[[ "$embedder" != *[[:space:]]* ]] || fail "--embedder $embedder: give a folder without blanks in its name"
numbers='^([0-9]+(,[0-9]+)?)?$'            # in a variable: the bash of macOS wants it so
number='^[0-9]*\.?[0-9]+$'
for t in $temperatures; do [[ "$t" =~ $number ]] || fail "--temperatures $temperatures: give numbers with blanks between"; done
ten='^([1-9][0-9]+)?$'                     # ten or more, where it is given
[[ "$samples" =~ $ten ]] || fail "--samples $samples: Pass@10 needs at least 10 drafts a post"
[[ "$posts" =~ $ten ]] || fail "--posts $posts: give 10 or more; the evaluation has a fifth as many"
[[ "$steps" =~ $numbers ]] || fail "--steps $steps: give one number, or two with a comma between"
[[ -z "$study" || -z "$model" ]] || fail "--study is for the small worlds: with --model say --arms"
case "$data" in pocket-code|pocket-stories) world="$data" ;; *) world="" ;; esac  # a small world by name
[[ "$data" != pocket || -f "$data" || -n "$model" ]] || data=""                  # the default one
[[ -z "$data" || -n "$world" || -f "$data" ]] || fail "there is no file $data: give --data a file of posts"
[[ -z "$narrow" || -n "$data" && -z "$model$world" ]] || fail "--narrow needs --data FILE: the small worlds have it"
if [[ -z "${RANK:-}" ]]; then
  command -v torchrun > /dev/null || fail "torchrun is not on the PATH: activate the environment that has torch"
  exec torchrun --standalone --nproc-per-node="${NPROC:-1}" "$here/train.sh" ${given[@]+"${given[@]}"}
fi
python="${STUDY_PYTHON:-python}"          # the interpreter that torchrun runs on

# ---- Studies: a question, the arms that answer it, and what they do differently --------------------------

losses="gem gem-logsigmoid entropy unlikelihood unlikelihood-sequence ba-lora ba-lora-nlu sed bonbon"
adapters="rslora dora pissa adalora lori multilora moa ensemble"
diversities="dpp vendi distinct floor ngram levenshtein"
objectives="drgrpo rloo passk-full passk-bootstrap passk-mixed maxk bon polychromic polyepo darling dra dqo
  uniqueness unlikeliness evol maxrl tailrl wreinforce focal ucpo mara soft-spo single-stream-spo"
others="dpp vendi distinct floor" beside="gspo dapo entropy clip-cov kl-cov"
weights="0.1 0.3 1 3" parts="0.3 1 3" schedules="rising falling held" rates="2e-4 1e-3 5e-3"
six="lora poly lora-grpo lora-passk lora-cover poly-grpo" best="poly-dpp dpp-cover@1"
phases="lora-grpo lora-passk lora-cover poly-grpo dpp-cover@1" stops="20 40 80"
seven="lora poly lora-grpo lora-passk poly-grpo poly-dpp dpp-grpo"  # where no reader's taste is rewarded
sft_pair="2e-3 4e-3" grpo_pair="1e-3 2e-3" three_rates="5e-4 $grpo_pair" all_rates="2.5e-4 $three_rates" twelve="$(echo {11..22})" fresh="$(echo {23..34})"
each() { local x r; for r in $2; do for x in $1; do printf '%s ' "$x-at-$r"; done; done; }  # "A B" "RATE RATE"
# The rows that their two trials (--study rates) gave twice the learning rate:
twice="sft-gem sft-gem-logsigmoid sft-entropy sft-ba-lora sft-ba-lora-nlu lora-adalora lora-lori lora-moa lora-ensemble
  poly-dpp poly-vendi poly-distinct poly-ngram poly-levenshtein poly-straight-through
  lora-rloo lora-gspo lora-passk-mixed lora-polyepo lora-darling lora-unlikeliness lora-focal lora-ucpo lora-mara"
after="dra polychromic darling"            # objectives that are also tried after SFT with D
published="polyepo darling dra polychromic"   # terms for diversity, where D stands beside coverage
quarter="lora-clip-cov lora-kl-cov"       # at four updates a batch 1e-3 was too much for these: a third trial, and its rate
named() { local name; for name in $2; do printf '%s%s ' "$1" "$name"; done; }  # PREFIX "A B": PREFIXA PREFIXB
case "$study" in
  "") asked="$six" ;;
  primary) asked="$six"; seeds="${seeds:-$twelve}" ;;
  trials) asked="lora poly $(each "$(named try-grpo- "0 0.1 0.3") $(named try-passk- "4 5 6")" "$grpo_pair")"
    asked="$asked $(each "$(named try-cover- "4 5 6") $(named try-poly- "2 4 8")" "$grpo_pair")" seeds="${seeds:-101 102}" ;;
  rates) asked="lora poly $(named sft- "$losses") $(named lora- "$adapters") $(named poly- "$diversities straight-through")"
    asked="lora poly $(each "$asked" "$sft_pair") $(each "$(named lora- "$beside $objectives")" "$grpo_pair")"
    asked="$asked $(each "$quarter" 2.5e-4)" seeds="${seeds:-101}" ;;
  map) asked="$six lora-d poly-then-grpo poly-then-passk poly-then-cover poly-passk-d poly-cover-d poly-set poly-set-distinct"
    asked="$asked $(named poly-grpo- "$others") poly-dpp dpp-then-grpo dpp-then-passk dpp-then-cover dpp-grpo"
    asked="$asked dpp-cover-floor lora-cover-dpp $(named dpp-cover@ "$parts") $(named lora-cover-dpp- "$schedules")" ;;
  cover) asked="$six $best lora-cover-dpp lora-cover-floor" seeds="${seeds:-$twelve}" endpoint="dpp-cover@1 lora-cover" ;;
  fresh) asked="lora lora-passk lora-cover $best dpp-then-cover" temperatures="${temperatures:-0.75}" seeds="${seeds:-$fresh}"
    endpoint="dpp-cover@1@0.75 lora-cover@0.75 lora-passk@0.75" ;;
  lambda) asked="lora lora-grpo $(named poly@ "$weights") $(named poly-then-grpo@ "$weights")" ;;
  full) asked="$(named lora@ "$rates") $(named full@ "$rates")" ;;
  losses) asked="lora poly $(named sft- "$losses")" ;;
  adapters) asked="lora poly $(named lora- "$adapters")" ;;
  diversities) asked="lora poly $(named poly- "$diversities straight-through")" ;;
  objectives) asked="$six $(named lora- "$beside $objectives")" ;;
  controls) asked="$six $best $(named lora-kl@ "0.1 0.3 1") $(named lora-grpo@ "$stops") lora-slow lora-fast lora-entropy lora-clip
    lora-clip-higher lora-informed lora-long lora-d lora-d-free lora-d-reward lora-d-likelihood lora-d-floor poly-then-grpo poly-then-passk" ;;
  paths) asked="$six $best"; for arm in $phases; do asked="$asked $(named "$arm@" "$stops")"; done ;;
  temperature) asked="$six $best sft-gem" temperatures="${temperatures:-0.5 0.75 1.25 1.6}" ;;
  free) asked="lora lora-grpo lora-half lora-wise" decoders="beams contrastive self-consistency best-of-n mmi" ;;
  valid) asked="$seven lora-kl-slow lora-dpp-grpo dpp-then-grpo dpp-then-kl-slow dpp-then-passk" reward=valid
    asked="$asked $(named lora- "polychromic-at-1e-3 polyepo-at-2e-3 darling-at-2e-3")" ;;
  few) k=4 set_size=3                      # beside the usual ones the best trials at T = 0.75 and 1; so in noisy
    asked="$six $best $(each "try-passk-3 try-cover-3 try-dpp-cover-3 try-both-1" 1e-3) try-both-3-at-2e-3 lora-polyepo-at-1e-3" ;;
  noisy) extra=(--flip 0.15)               # there dpp-cover@1 is the best at 0.75
    asked="$six $best $(each "try-passk-4 try-cover-4 try-dpp-cover-4" 1e-3) try-dpp-cover-6-at-5e-4 try-both-3-at-2e-3"
    asked="$asked $(each lora-polyepo "1e-3 2e-3")" ;;
  blind) asked="$seven lora-kl@0.3 lora-dpp-grpo dpp-then-grpo dpp-then-passk" reward=agreement gate=likelihood like=3 passk=maxk
    asked="$asked $(named lora- "dra-at-5e-4 polychromic-at-5e-4")" ;;
  valid-trials|blind-trials)               # less learning and smaller sets may suit rivals better there
    asked="lora poly-dpp $(each "$(named try-grpo- "0 0.1 0.3") $(named try-dpp-kl- "0 0.1 0.3")" "5e-4 1e-3")" seeds="${seeds:-101}"
    asked="$asked $(each "$(named try-passk- "2 4 6") $(named try-dpp-passk- "2 4 6") $(named try-dpp-grpo- "1 3 6")" "$grpo_pair")"
    known="polychromic dra unlikeliness entropy" further="darling dra polychromic polyepo" third=2e-3
    if [[ "$study" == valid* ]]; then reward=valid known="$known darling uniqueness polyepo evol ucpo maxrl mara"
    else reward=agreement gate=likelihood passk=maxk known="$known tailrl" further="dra polychromic tailrl" third=2.5e-4 after="dra polychromic"; fi
    # Those that were best at the last rate tried had one more.
    asked="$asked $(each "$(named lora- "$known")" "5e-4 1e-3") $(each "$(named lora- "$further")" $third)"
    asked="$asked $(each "$(named dpp-then- "$after")" "5e-4 1e-3")" ;;
  noisy-trials)                            # and wrong verdicts less learning still
    seeds="${seeds:-101}" extra=(--flip 0.15)
    asked="lora poly-dpp $(each "$(named try-passk- "4 6")" "2.5e-4 5e-4 1e-3")"
    asked="$asked $(each "$(named try-cover- "4 6") $(named try-dpp-cover- "4 6") $(named try-both- "1 3")" "$three_rates")"
    asked="$asked $(each "$(named lora- "$published")" "5e-4 1e-3") $(each "lora-polyepo lora-dra" 2e-3)"
    asked="$asked $(each "lora-darling lora-polychromic" 2.5e-4)" ;;
  few-trials)
    k=4 set_size=3 seeds="${seeds:-101}"
    asked="lora poly-dpp $(each "$(named try-passk- "2 3") $(named try-cover- "2 3") $(named try-dpp-cover- "2 3")" "$grpo_pair")"
    asked="$asked $(each "$(named try-both- "1 3")" "$grpo_pair") $(each "$(named lora- "$published")" "$three_rates")" ;;
  *) fail "there is no study $study: see --help" ;;
esac
[[ -z "$study" ]] || seeds="${seeds:-11 12 13 14 15}"

# ---- Settings. Those of the small worlds were chosen on seeds that no report uses: see LOG.md ----------

cores=$(( $(getconf _NPROCESSORS_ONLN) / WORLD_SIZE ))
(( cores > 0 )) || cores=1                 # more ranks than cores
first_steps="${steps%,*}" then_steps="${steps#*,}"   # the same where one number is given
name="$(basename "${study:-${data:-pocket}}")"; out="${out:-runs/${name%%.*}$narrow}"
if [[ -z "$model" ]]; then
  arms="${arms:-$asked}"
  seeds="${seeds:-1 2 3}"; posts="${posts:-1000}"; lambda="${lambda:-0.3}"
  sizes="base=$(( posts * 5 )),sft=$posts,grpo=$(( posts * 2 )),eval=$(( posts / 5 ))"
  # Narrow writers: SFT pairs come from few voices, which readers like more evenly.
  narrowly=(--popularity 0.7 --writers 3)
  if [[ -z "$data" ]]; then
    # Each scene's readers have an order of their own; the scenes of the evaluation are in no other part.
    split=(--by intent "${narrowly[@]}" --permute) noise=0.2
    # Some seeds learn the scenes a hundred steps later than others: each base ends at the same loss.
    [[ -n "$base_steps" ]] || { base_steps=600; until=(--until 0.70 --schedule constant); }
    sft_steps=40 grpo_steps=120 weight="${weight:-8}" part=6
    cover="--set-size ${set_size:-4} --lr 2e-3" set_size="${set_size:-6}"
  else
    sizes="base=$(( posts * 5 )),sft=$posts,grpo=$posts,eval=$(( posts / 5 ))"
    [[ -z "$world$narrow" ]] || split=("${narrowly[@]}" ${narrow:+--permute})
    base_steps="${base_steps:-$([[ "$world" == pocket-stories ]] && echo 500 || echo 1200)}"  # tales are soon learnt
    noise=0.1; sft_steps=120 grpo_steps=80 weight="${weight:-4}" part=3
  fi
  length=24; [[ "$world" != pocket-stories ]] || length=48
  small=(--hidden 192 --layers 2 --heads 6 --lr 3e-3 --beta2 0.98 --warmup 20 --noise "$noise" --micro-tokens 1024)
  adapter=(--rank 16 --alpha 32); strength="--lambda $lambda" slow=5e-4 fast=2e-3
  sft=(--lr 2e-3 --batch 32 --steps "${first_steps:-$sft_steps}" --max-new-tokens "$length" --micro-tokens 1024 --save-every 40)
  grpo=(--lr 1e-3 --batch 16 --steps "${then_steps:-$grpo_steps}" --max-new-tokens "$length" --micro-tokens 2048 --save-every 40)
  gate="${gate:-verifier}" floor=0 passk="${passk:-passk}"
  samples="${samples:-$([[ -n "$study" ]] && echo 40 || echo 24)}"  # bare: within a quarter of an hour on 2 cores
  # One thread a process: two busy processes of two threads each on two cores wait for each other.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  count="$(wc -w <<< "$seeds")"
  # Three seeds on two cores run all at once: a second round would leave a core idle.
  jobs="${jobs:-$(( WORLD_SIZE == 1 && count > cores && count < 2 * cores ? count : cores ))}"
else
  arms="${arms:-lora poly lora-grpo lora-passk poly-grpo}"
  seeds="${seeds:-1}"; gate=likelihood then_gate=auto floor=0 passk=maxk samples="${samples:-20}" part=1
  # The likelihood's scale and the embedder decide what a lambda does: D's share of the gradient is held instead.
  strength="--lambda-share ${share:-0.3}"; [[ -z "$lambda" ]] || strength="--lambda $lambda"
  if [[ "$("$python" -c 'import torch; print(torch.cuda.is_available())')" == True ]]; then
    posts="${posts:-2500}"; jobs=1 length=100 sft_steps=0 slow=1e-5 fast=4e-5; adapter=(--rank 16 --alpha 16)
    batch=$(( WORLD_SIZE > 16 ? WORLD_SIZE : 16 ))   # every rank has a post
    sft=(--lr 2e-4 --batch "$batch" --steps "${first_steps:-$sft_steps}" --max-new-tokens 100 --checkpointing)
    grpo=(--lr 2e-5 --batch "$batch" --steps "${then_steps:-0}" --max-new-tokens 100 --checkpointing)
  else                                     # a small language model, an hour or two
    [[ -n "$posts" ]] || sizes="sft=1440,grpo=320,eval=100"
    length=24 sft_steps=90 slow=1.5e-4 fast=6e-4; adapter=(--rank 16 --alpha 32)
    ! grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || held+=(--dtype bfloat16)  # twice as fast where the CPU has it
    sft=(--lr 2e-3 --batch 16 --steps "${first_steps:-$sft_steps}" --draft-every 3 --max-new-tokens 24 --micro-tokens 2048 --save-every 30)
    grpo=(--lr 3e-4 --batch 8 --steps "${then_steps:-20}" --warmup 5 --max-new-tokens 24 --micro-tokens 4096 --save-every 10)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    jobs="${jobs:-$cores}"
  fi
  sizes="${sizes:-sft=$posts,grpo=$posts,eval=$(( posts < 2500 ? posts / 5 : 500 ))}"
fi
set_size="${set_size:-4}" then_gate="${then_gate:-$gate}" four=$(( k > 4 ? 4 : k - 1 ))
cover="${cover:---set-size $set_size}"
like="${like:-$part}"                      # D's part of the advantages at the default --weight, measured
[[ -z "$targets" ]] || adapter+=(--targets "$targets")
(( WORLD_SIZE <= 8 )) || sft+=(--draft-posts "$WORLD_SIZE")
long="--steps $(( ${first_steps:-$sft_steps} * 14 / 5 ))"                # the seconds of polychromic SFT
[[ "$long" != "--steps 0" ]] || long="--epochs 2.8"
grpo+=(--k "$k" ${extra[@]+"${extra[@]}"} --reward "$reward" ${reward_model:+--reward-model "$reward_model"} --embedder "$embedder")
[[ -z "$study" ]] || reward=auto          # whatever an arm was paid by, the readers judge
judge=(--reward "$reward" ${reward_model:+--reward-model "$reward_model"} --embedder "${judge_embedder:-$embedder}")
poly="--k $k --gate $gate --embedder $embedder ${extra[*]+"${extra[*]}"}"
spread="--diversity-weight $weight --gate $then_gate --gate-floor $floor"
# Gated by likelihood a language model was paid for longer, likelier drafts: see LOG.md.
[[ -n "$weight" ]] || spread="--diversity-share 1 --gate auto"
[[ "$jobs" -ge 1 ]] || jobs=1
[[ -z "$dry" ]] || out="$out-dry-run"      # removed again

# ---- The arms: name, phase, the arm that it starts from, flags ------------------------------------------

row() {  # NAME PHASE START FLAGS..: a line of a register; in a small world at its own rate, and at each that was tried
  local rate tried="$all_rates" own=""     # the last is twice the usual one
  [[ -z "$model" ]] || { echo "$*"; return; }
  [[ "$2" != sft ]] || tried="$sft_pair"
  [[ " $quarter " != *" $1 "* ]] || own="--lr 2.5e-4"
  [[ " "$twice" " != *[[:space:]]"$1"[[:space:]]* ]] || own="--lr ${tried##* }"
  echo "$* $own"
  for rate in $tried; do echo "$1-at-$rate ${*:2} --lr $rate"; done
}

try() {  # NAME START FLAGS..: every try-NAME-KNOB-at-RATE that is asked; the last flag is the knob's
  local x trial='^([0-9.]+)-at-([0-9.e-]+)$'
  [[ -z "$model" ]] || return 0            # those rates are small worlds'
  for x in $arms; do
    [[ "$x" == try-$1-* && "${x#try-$1-}" =~ $trial ]] || continue
    echo "$x grpo $2 ${*:3} ${BASH_REMATCH[1]} --lr ${BASH_REMATCH[2]}"
  done
}

every_arm() {
  local x both="--advantage coverage $cover --diversity dpp --gate $then_gate"
  row lora sft - --lambda 0
  row poly sft - $strength $poly
  for x in $losses; do row "sft-$x" sft - --lambda 0 --loss "$x" --k 8; done
  for x in $adapters; do row "lora-$x" sft - --lambda 0 --adapter "$x"; done
  for x in $diversities; do row "poly-$x" sft - $strength $poly --diversity "$x"; done
  row poly-straight-through sft - $strength $poly --d-gradient straight-through
  cat <<END
lora-grpo           grpo  lora  --advantage group
lora-passk          grpo  lora  --advantage $passk --set-size $set_size
lora-cover          grpo  lora  --advantage coverage $cover
poly-grpo           grpo  poly  --advantage group $spread
poly-then-grpo      grpo  poly  --advantage group
poly-then-passk     grpo  poly  --advantage $passk --set-size $set_size
poly-then-cover     grpo  poly  --advantage coverage $cover
poly-passk-d        grpo  poly  --advantage $passk --set-size $set_size --diversity-share $like --gate $then_gate
poly-cover-d        grpo  poly  --advantage coverage $cover --diversity-share $like --gate $then_gate
poly-set            grpo  poly  --advantage polychromic --set-size $four --gate $then_gate
poly-set-distinct   grpo  poly  --advantage polyepo --set-size $four
lora-d              grpo  lora  --advantage group $spread
lora-d-free         grpo  lora  --advantage group --diversity-weight ${weight:-1} --gate none
lora-d-reward       grpo  lora  --advantage group --diversity-weight ${weight:-1} --gate reward
lora-d-likelihood   grpo  lora  --advantage group --diversity-weight ${weight:-1} --gate likelihood
lora-d-floor        grpo  lora  --advantage group --diversity-weight ${weight:-1} --gate $then_gate --diversity floor
lora-informed       grpo  lora  --advantage group --valid-weight 0.5
lora-slow           grpo  lora  --advantage group --lr $slow
lora-kl-slow        grpo  lora  --advantage group --beta 0.3 --lr $slow
lora-fast           grpo  lora  --advantage group --lr $fast
lora-clip           grpo  lora  --advantage group --updates 4
lora-clip-higher    grpo  lora  --advantage group --updates 4 --clip-high 0.28
lora-half           wise  lora-grpo  lora-grpo --scale 0.5
lora-wise           wise  lora  lora-grpo --weight 0.5
dpp-then-grpo       grpo  poly-dpp  --advantage group
dpp-then-kl-slow    grpo  poly-dpp  --advantage group --beta 0.3 --lr $slow
dpp-then-passk      grpo  poly-dpp  --advantage $passk --set-size $set_size
dpp-then-cover      grpo  poly-dpp  --advantage coverage $cover
dpp-grpo            grpo  poly-dpp  --advantage group --diversity dpp --diversity-share $like --gate $then_gate
lora-dpp-grpo       grpo  lora      --advantage group --diversity dpp --diversity-share $like --gate $then_gate
dpp-cover-floor     grpo  poly-dpp  --advantage coverage $cover --diversity floor --diversity-share 1 --gate $then_gate
lora-cover-dpp      grpo  lora      $both --diversity-share 1
lora-cover-floor    grpo  lora      --advantage coverage $cover --diversity floor --diversity-share 1 --gate $then_gate
lora-long           sft   -     --lambda 0 $long
END
  for x in $schedules; do echo "lora-cover-dpp-$x grpo lora $both --diversity-share 1 --diversity-schedule $x"; done
  for x in 0.1 0.3 1; do echo "lora-kl@$x grpo lora --advantage group --beta $x"; done
  for x in $weights; do echo "poly@$x sft - --lambda $x $poly"; done
  for x in $weights; do echo "poly-then-grpo@$x grpo poly@$x --advantage group"; done
  for x in $rates; do echo "lora@$x sft - --lambda 0 --lr $x"; done
  for x in $rates; do echo "full@$x sft - --lambda 0 --adapter full --lr $x"; done
  try grpo lora --advantage group --beta
  try dpp-kl poly-dpp --advantage group --beta
  try passk lora --advantage $passk --set-size
  try dpp-passk poly-dpp --advantage $passk --set-size
  try cover lora --advantage coverage --set-size
  try dpp-cover poly-dpp --advantage coverage --set-size
  try poly poly --advantage group --gate $gate --diversity-weight
  try dpp-grpo poly-dpp --advantage group --diversity dpp --gate $gate --diversity-share
  try both poly-dpp $both --diversity-share
  for x in $after; do row "dpp-then-$x" grpo poly-dpp --advantage "$x" --set-size "$four"; done
  for x in $parts; do echo "dpp-cover@$x grpo poly-dpp $both --diversity-share $x"; done
  for x in $others; do  # another D in phase two, at the part of the advantages that cosine has
    echo "poly-grpo-$x grpo poly --advantage group --diversity $x --diversity-share $like --gate $then_gate"
  done
  row lora-gspo grpo lora --advantage group --updates 4 --ratio sequence --clip-low 3e-4 --clip-high 4e-4
  row lora-dapo grpo lora --advantage group --updates 4 --clip-high 0.28 --resample 3 --overlong 4
  row lora-entropy grpo lora --advantage group --entropy-weight 0.01
  for x in clip-cov kl-cov; do row "lora-$x" grpo lora --advantage group --updates 4 --tokens "$x" --token-share 0.01; done
  for x in $objectives; do
    case "$x" in mara|soft-spo) row "lora-$x" grpo lora --advantage "$x" --beta 0.1 ;;  # their pull to the start
      *) row "lora-$x" grpo lora --advantage "$x" --set-size "$four" ;; esac
  done
}
table="$(every_arm)"; arms="$(echo $arms)"  # one blank between names
table+="$(while read -r arm line; do        # every second phase stopped early
  [[ " $phases " != *" $arm "* ]] || for x in $stops; do printf '\n%s' "$arm@$x $line --steps $x"; done
done <<< "$table")"
for arm in $arms; do
  [[ $'\n'"$table" == *$'\n'"$arm "* ]] || fail "there is no arm $arm: the arms stand in $here/train.sh"
  for t in $temperatures; do
    [[ $'\n'"$table" != *$'\n'"$arm@$t "* ]] || fail "--temperatures $t: $arm@$t is an arm of its own; write the number otherwise (as 0.30)"
  done
done

# ---- Stages ---------------------------------------------------------------------------------------------

quoted() {  # WORDS..: on one line, so that a shell reads the same words again
  local word line="" plain='^[A-Za-z0-9_@%+=:,./-]+$'
  for word in "$@"; do
    [[ "$word" =~ $plain ]] || printf -v word '%q' "$word"
    line+=" $word"
  done
  echo "${line# }"
}

stages=0                                   # of a seed: ranks that meet twice under one name would read old addresses
stage() {  # ROOM ARGUMENTS..: one program; when it fails, what failed and the command that repeats it
  local room="$1" code=0 said=() word; shift
  export STUDY_STAGE="$(( ++stages ))"
  if [[ -n "$dry" && "$1" != split ]]; then
    for word in "$@"; do                   # as it will be without --dry-run
      [[ "$word" != "$out"* ]] || word="${out%-dry-run}${word#"$out"}"
      said+=("$word")
    done
    [[ "$RANK" != 0 ]] || echo "python $room.py $(quoted ${said[@]+"${said[@]}"})"
    set -- "$@" --dry-run
  fi
  "$python" "$here/$room.py" "$@" || code=$?
  (( code == 0 )) || { echo "train.sh: rank $RANK: $room.py ended with exit code $code; to repeat it alone:" \
    "$(quoted "$python" "$here/$room.py" "$@")" >&2; return "$code"; }
}

study() {  # SEED: every arm, then the drafts of each for the held-out posts
  trap : TERM INT                          # the program in front is told too, and saves before it ends
  local seed="$1" to="$out/seed$1" from base measured=() name phase start flags
  # A seed has posts of its own in a small world, and without --model a base of its own.
  local deal="$seed"
  if [[ -n "$data" && -z "$world" ]]; then from="$out/data" deal=0; else from="$to/data"; fi
  stage data split --data "${data:-pocket}" --sizes "$sizes" --seed "$deal" --out "$from" ${split[@]+"${split[@]}"} ${code[@]+"${code[@]}"}
  base="$model"
  if [[ -z "$model" ]]; then
    stage polylora base --data "$from/base.jsonl" --out "$to/base-model" --seed "$seed" --resume --steps "$base_steps" ${until[@]+"${until[@]}"} "${small[@]}"
    base="$to/base-model/model"
    # A dry run's later stages need some model: one of a single step, whose drafts are as long as can be.
    [[ -z "$dry" ]] || STUDY_STAGE=again "$python" "$here/polylora.py" base --data "$from/base.jsonl" --out "$to/base-model" --steps 1 "${small[@]}"
  fi
  local first=(--model "$base" --data "$from/sft.jsonl" "${adapter[@]}" "${sft[@]}")
  local second=(--model "$base" --data "$from/grpo.jsonl" "${grpo[@]}")
  local common=(--seed "$seed" --resume ${held[@]+"${held[@]}"} ${code[@]+"${code[@]}"})
  while read -r name phase start flags; do
    [[ " $arms " == *" $name "* ]] || continue
    [[ -n "$dry" ]] || measured+=("$to/$name")
    case "$phase" in                        # $flags is split into words on purpose
      sft) stage polylora sft "${first[@]}" "${common[@]}" --out "$to/$name" $flags < /dev/null ;;
      wise) if [[ -n "$dry" || -f "$to/$name/done.json" ]]; then : "$(( ++stages ))"; continue; fi
        stage polylora wise "$to/$start" "$to/${flags%% *}" --out "$to/$name" ${flags#* } ;;
      grpo) stage grpo "${second[@]}" "${common[@]}" --start "$to/$start" --out "$to/$name" $flags < /dev/null ;;
    esac
  done <<< "$table"
  local measure=(--model "$base" --data "$from/eval.jsonl" --seed "$seed" "${judge[@]}" --n "$samples"
    --max-new-tokens "$length" ${code[@]+"${code[@]}"} ${held[@]+"${held[@]}"}) t
  stage evaluate measure "${measure[@]}" --bare "$to/base" ${measured[@]+"${measured[@]}"}
  for t in $temperatures; do               # RUN@t, each an arm of its own
    stage evaluate measure "${measure[@]}" --temperature "$t" --name "$t" ${measured[@]+"${measured[@]}"}
  done
  local of=("$to/lora")
  [[ -z "$dry" ]] || of=(--bare "$to/base")
  for t in $decoders; do                   # RUN@decoder
    stage evaluate measure "${measure[@]}" --decoder "$t" "${of[@]}"
  done
}

end_all() {  # whatever still runs in this process group, the other seeds' programs included
  trap '' TERM INT
  [[ -z "${STUDY_GROUP:-}" ]] || kill -TERM 0
  wait
}
trap 'end_all; exit 143' TERM
trap 'end_all; exit 130' INT

workers=()
reap() {  # wait until fewer than $1 workers run; the first that failed ends the others
  while (( ${#workers[@]} >= $1 && ${#workers[@]} > 0 )); do
    local going=() worker code
    for worker in "${workers[@]}"; do
      if kill -0 "$worker" 2> /dev/null; then going+=("$worker"); continue; fi
      code=0; wait "$worker" || code=$?
      (( code == 0 )) || { end_all; exit "$code"; }
    done
    workers=(${going[@]+"${going[@]}"})
    (( ${#workers[@]} < $1 )) || sleep 0.3
  done
}
if [[ -n "$dry" ]]; then                   # one seed tells of all: as many rounds as the seeds take
  mkdir -p "$(dirname "$out")"
  study "${seeds%% *}" | tee "$out.txt"
  rounds=$(( ($(wc -w <<< "$seeds") + jobs - 1) / jobs ))
  [[ "$RANK" != 0 ]] || awk -v runs=$(( $(wc -w <<< "$arms") + 1 )) -v rounds="$rounds" -v shared=$(( jobs > cores ? jobs : cores )) -v cores="$cores" '
    / a run: / { total += (/^plan measure/ ? runs : 1) * $(NF - 1); next } /^plan / { total += $(NF - 1) }
    END { total *= shared / cores
      printf "The whole study: about %.0f minutes (%d x %.0f s)\n", rounds * total / 60, rounds, total }' "$out.txt"
  [[ "$RANK" != 0 ]] || rm -rf "$out" "$out.txt"
  exit
fi
for seed in $seeds; do                     # `jobs` seeds at a time, side by side
  reap "$jobs"
  study "$seed" & workers+=($!)
done
reap 1

if [[ "$RANK" == 0 ]]; then
  runs=()
  for seed in $seeds; do
    for arm in base $arms; do runs+=("$out/seed$seed/$arm"); done
    for t in $temperatures; do for arm in $arms; do runs+=("$out/seed$seed/$arm@$t"); done; done
    for t in $decoders; do runs+=("$out/seed$seed/lora@$t"); done
  done
  against=base rivals=""
  [[ " $arms " != *" lora-grpo "* ]] || against=lora-grpo
  ours=poly-grpo
  [[ " $arms " != *" dpp-cover@1 "* ]] || ours=dpp-cover@1
  for arm in lora-cover lora-passk; do
    [[ " $arms " != *" $arm "* || " $arms " != *" $ours "* ]] || rivals="$rivals $arm"
  done
  for arm in $endpoint; do                 # the study's own, where all its arms were asked
    [[ " ${runs[*]} " == *"/$arm "* ]] || endpoint=""
  done
  [[ -z "$rivals" ]] || endpoint="${endpoint:-$ours $rivals}"
  stage evaluate report "${runs[@]}" --out "$out/report${study:+-$study}" --against "$against" ${endpoint:+--primary $endpoint}
  echo "The report, with its pictures, is in $out/report${study:+-$study}. Try:" \
    "python evaluate.py drafts $(quoted "$out/seed${seeds%% *}/${arms##* }") \"some post\""
fi
exit
'''
import os, sys
if os.getpgrp() != os.getpid():
    os.setpgid(0, 0)
os.environ |= {"STUDY_PYTHON": sys.executable, "STUDY_GROUP": "own"}
os.execvp("bash", ["bash", *sys.argv])
