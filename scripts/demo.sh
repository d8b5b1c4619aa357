#!/bin/sh
# The main job from end to end, on handwritten digits and the bundled checkpoint: no download.
set -eu

data=demo-data run=demo-run
if [ ! -d "$data" ]; then
    rm -rf "$data.part"
    lance-host sample-data "$data.part" && mv "$data.part" "$data"
fi
rm -rf "$run"
mkdir "$run"

echo "== workstation: calibrate once"
lance-host calibrate --model mcunet --weights bundled --data "$data" --layers 4 --energy 0.9 --batch-size 32 \
    -o "$run/pkg.tar"

for method in lance bp; do
    echo "== device: train with $method"
    # A mirrored digit is no digit: no flips.
    lance-device train --artifact "$run/pkg.tar" --data "$data" --method "$method" --augment none \
        --epochs 8 --out "$run/$method"
done

echo "== side by side"
lance-device compare "$run/lance" "$run/bp"

echo "== figures"
lance-host report "$run/lance" "$run/bp" -o "$run/report.html"
