#!/usr/bin/env bash
# Figures of the trade-off and of the spectrum, from trained prefixes of 1 to 256 vectors and a trained memory.
#   experiments/prefix_lengths.sh FOLDER        (about ten minutes on two cores; needs the extras demo and analysis)
# The adapters go to FOLDER; what is there is not trained again. Figures and records: results/analysis/.
set -euo pipefail
folder=${1:?give a folder for the adapters}
results=$(dirname "$0")/../results/analysis
data=$(dirname "$0")/../src/prefixmemory/data/northline/train.jsonl
common=(--model smollm2 --data "$data" --dtype bfloat16 --epochs 2 --batch-size 8 --set attention=eager --set data.per_label=6 --set training.warmup=0.1)
prefixes=()
for length in 1 4 16 64 256; do
  prefixes+=("$folder/prefix-$length")
  [ -d "$folder/prefix-$length" ] || prefixmemory train "${common[@]}" --output "$folder/prefix-$length" \
    --learning-rate 3e-2 --set method.placement=inside --set method.prefix_length=$length
done
[ -d "$folder/memory" ] || prefixmemory train "${common[@]}" --output "$folder/memory" --learning-rate 3e-4 \
  --set method.feed_forward=null --set method.active_from=start --set method.rank=null --set method.normalize=none --set method.output_limit=null
rm -rf "$results/tradeoff" "$results/spectrum"
prefixmemory inspect "${prefixes[@]}" --what tradeoff --length 4096 --output "$results/tradeoff"
prefixmemory inspect "$folder/prefix-16" "$folder/memory" --what spectrum --output "$results/spectrum"
