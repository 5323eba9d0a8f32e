#!/usr/bin/env bash
# Makes the runs of docs/results.md. Call it from the top folder: bash assets/results/run_all.sh [hands|bodies|tiny]
#
# On one core a seed of the hands takes about a day. A finished run says so and is left alone, so you can
# interrupt this script and start it again. Pre-training comes first, because rows share it.
set -euo pipefail
jobs=${JOBS:-2}  # how many runs at once; one per core

pretrain="train_pretrain.py --preset small --threads 1"
finetune="train_finetune.py --preset small --threads 1"

hands_pretraining() {
    local runs=runs/small
    for seed in 0 1 2 3 4; do
        for variant in full mae; do
            echo "$pretrain --variant $variant --seed $seed"
        done
    done
    for seed in 0 1 2; do
        for variant in no-fcr no-xc source-masks source-only source-only-mae source-only-no-xc; do
            echo "$pretrain --variant $variant --seed $seed"
        done
        for r in 0.5 0.95; do
            echo "$pretrain --epochs 50 --mask-ratio $r --seed $seed --out $runs/pretrain-r$r-epochs50-seed$seed"
        done
        for alpha in 2 8; do
            echo "$pretrain --epochs 50 --alpha $alpha --seed $seed --out $runs/pretrain-alpha$alpha-epochs50-seed$seed"
        done
        for epochs in 25 50 100; do
            echo "$pretrain --epochs $epochs --seed $seed --out $runs/pretrain-epochs$epochs-seed$seed"
        done
        echo "$pretrain --target-masks datasets/hands/target_train/masks.npy --seed $seed" \
            "--out $runs/pretrain-true-masks-seed$seed"
    done
}

hands_finetuning() {
    local runs=runs/small
    for seed in 3 4; do
        for variant in scratch mae no-ar full; do
            echo "$finetune --variant $variant --seed $seed"
        done
    done
    for seed in 0 1 2; do
        for variant in scratch oracle full no-ar mae no-fcr no-xc source-masks source-only source-only-mae \
            source-only-no-xc no-fcr-ar no-xc-ar no-fcr-xc ddc dan dann mae-ddc mae-dan mae-dann mt mae-mt full-mt probe; do
            echo "$finetune --variant $variant --seed $seed"
        done
        echo "$finetune --variant full-mt --lam 0 --seed $seed --out $runs/no-ar-mt-seed$seed"
        echo "$finetune --variant full-mt --adapt-weight 0 --seed $seed --out $runs/full-mt-weight0-seed$seed"
        for name in {r0.5,r0.95,alpha2,alpha8}-epochs50 epochs25 epochs50 epochs100 true-masks; do
            echo "$finetune --init $runs/pretrain-$name-seed$seed --seed $seed --out $runs/$name-seed$seed"
        done
        for lam in 0 0.1 1 10 1000; do
            echo "$finetune --lam $lam --seed $seed --out $runs/lam$lam-seed$seed"
        done
        # what AR does: the images on which it holds the attention, and slower blocks instead of it
        for images in target_train source_train unconstrained; do
            echo "$finetune --target datasets/hands/$images --seed $seed --out $runs/ar-on-$images-seed$seed"
            echo "$finetune --target datasets/hands/$images --init $runs/pretrain-source-only-seed$seed --seed $seed" \
                "--out $runs/source-only-ar-on-$images-seed$seed"
        done
        for decay in 1 0.75 0.5; do
            echo "$finetune --variant no-ar --layer-decay $decay --seed $seed --out $runs/no-ar-decay$decay-seed$seed"
        done
        for decay in 1 0.5; do
            echo "$finetune --variant source-only --layer-decay $decay --seed $seed" \
                "--out $runs/source-only-decay$decay-seed$seed"
        done
        echo "$finetune --variant no-ar --init $runs/pretrain-epochs50-seed$seed --seed $seed" \
            "--out $runs/no-ar-epochs50-seed$seed"
        # labels: 2,000 steps each, and five times as many with all 10,000
        for variant in full scratch; do
            for labels in 64 125 250 500; do
                echo "$finetune --variant $variant --labels $labels --epochs $((64000 / labels)) --seed $seed" \
                    "--out $runs/$variant-labels$labels-seed$seed"
            done
            echo "$finetune --variant $variant --labels 0 --epochs 6.4 --seed $seed" \
                "--out $runs/$variant-labels10000-seed$seed"
            echo "$finetune --variant $variant --labels 0 --epochs 32 --seed $seed" \
                "--out $runs/$variant-labels10000-steps10000-seed$seed"
        done
    done
}

bodies_pretraining() {
    local runs=runs/small-human
    for seed in 0 1 2; do
        for variant in full mae no-fcr no-xc source-masks source-only source-only-mae source-only-no-xc; do
            echo "$pretrain --task human --epochs 100 --variant $variant --seed $seed"
        done
        echo "$pretrain --task human --epochs 100 --target-masks datasets/bodies/target_train/masks.npy --seed $seed" \
            "--out $runs/pretrain-true-masks-seed$seed"
        for row in "" "r0.5- --mask-ratio 0.5" "r0.95- --mask-ratio 0.95" "alpha2- --alpha 2" "alpha8- --alpha 8"; do
            set -- $row
            echo "$pretrain --task human --epochs 25 ${*:2} --seed $seed --out $runs/pretrain-${1-}epochs25-seed$seed"
        done
    done
    echo "$pretrain --task human --variant mae --epochs 25 --out $runs/pretrain-mae-epochs25-seed0"
}

bodies_finetuning() {
    local runs=runs/small-human
    for seed in 0 1 2; do
        for variant in full no-ar scratch oracle ddc dan dann mae no-fcr-xc no-fcr no-fcr-ar no-xc no-xc-ar source-masks \
            mae-ddc mae-dan mae-dann source-only source-only-mae source-only-no-xc; do
            echo "$finetune --task human --variant $variant --seed $seed"
        done
        echo "$finetune --task human --init $runs/pretrain-true-masks-seed$seed --seed $seed --out $runs/true-masks-seed$seed"
        for name in {r0.5-,r0.95-,alpha2-,alpha8-,}epochs25; do
            echo "$finetune --task human --init $runs/pretrain-$name-seed$seed --seed $seed --out $runs/$name-seed$seed"
        done
        for decay in 1 0.75 0.5; do
            echo "$finetune --task human --variant no-ar --init $runs/pretrain-epochs25-seed$seed --layer-decay $decay" \
                "--seed $seed --out $runs/no-ar-epochs25-decay$decay-seed$seed"
        done
    done
    echo "$finetune --task human --variant mae --init $runs/pretrain-mae-epochs25-seed0 --out $runs/mae-epochs25-seed0"
    echo "$finetune --task human --lam 100 --out $runs/lam100"
}

hands_with_144_patches() {
    local runs=runs/patch4 size="--patch 4 --epochs"
    for seed in 0 1 2; do
        python $pretrain $size 40 --seed $seed --out $runs/pretrain-full-seed$seed
        python $pretrain $size 40 --seed $seed --variant mae --out $runs/pretrain-mae-seed$seed
        python $pretrain $size 40 --seed $seed --variant no-fcr --target-masks $runs/pretrain-full-seed$seed \
            --out $runs/pretrain-no-fcr-seed$seed
        for variant in full no-ar no-fcr no-fcr-ar mae; do
            local before=${variant%-ar}
            [[ $variant == no-ar ]] && before=full
            python $finetune $size 32 --seed $seed --variant $variant --init $runs/pretrain-$before-seed$seed \
                --out $runs/$variant-seed$seed
        done
        python $finetune $size 32 --seed $seed --variant scratch --out $runs/scratch-seed$seed
    done
    python evaluate.py $runs --pictures none
}

bodies_at_96_px() {
    local bodies=datasets/bodies-96/bodies runs=runs/bodies-96
    local task="--task human --image 96 --source $bodies/source_train --target $bodies/target_train"
    python data.py bodies $bodies --side 120
    python $pretrain $task --unconstrained $bodies/unconstrained --epochs 50 --out $runs/pretrain-full
    for variant in full no-ar; do
        python $finetune $task --validation $bodies/source_val --sigma 3.6 --variant $variant \
            --init $runs/pretrain-full --out $runs/$variant
    done
    python $finetune $task --validation $bodies/source_val --sigma 3.6 --variant scratch --out $runs/scratch
    python evaluate.py $runs --source-test $bodies/source_test --target-test $bodies/target_test
}

all_at_once() {
    xargs -P "$jobs" -L 1 python
}

hands() {
    python data.py hands datasets/hands
    hands_pretraining | all_at_once
    hands_finetuning | all_at_once
    for images in target_test shifted_test scenery_test figure_test; do
        python evaluate.py runs/small --pictures none --target-test datasets/hands/$images
    done
    hands_with_144_patches
}

bodies() {
    python data.py bodies datasets/bodies
    bodies_pretraining | all_at_once
    bodies_finetuning | all_at_once
    for images in target_test scenery_test figure_test; do
        python evaluate.py runs/small-human --pictures none --target-test datasets/bodies/$images
    done
    bodies_at_96_px
}

tiny() {  # the results of tiny.jsonl (1,000 labels) and of demo.jsonl (125)
    local same="--threads 1"
    for seed in 0 1 2; do
        python train_pretrain.py $same --seed $seed
        for variant in full scratch; do
            python train_finetune.py $same --variant $variant --seed $seed
            python train_finetune.py $same --variant $variant --seed $seed --labels 125 --epochs 256 \
                --out runs/demo/$variant-seed$seed
        done
    done
    python evaluate.py runs/tiny
    python evaluate.py runs/demo
}

for part in "${@:-hands}"; do
    "$part"
done
