#!/bin/sh
# Evaluates the pair that comes with the package, and writes the two reports beside this file:
#
#     sh reports/reference_pair/reproduce.sh path/to/val-a.tar.xz
#
# Started again after an interruption it goes on where it stopped. val-a.tar.xz: 25 images of each class of
# Tiny-ImageNet-200's validation set, made by val_a.py. N images of it meet the cheap attacks, the FEW first drawn of
# these the costly ones, as do all photos and FEW of them. WITH_AUTOATTACK=1 compares with AutoAttack. Further arguments
# go to every evaluation, such as --share.
set -eu
VAL_A=$1
shift
N=${N:-1000}
FEW=${FEW:-200}
PHOTOS=${PHOTOS:-500}
COSTLY=${COSTLY-1}
RUNS=${RUNS:-reports/runs/reference_pair}
OUT=${OUT:-reports/reference_pair}
PAIR="--model lr_resnet50 --model resnet50"
CHEAP="--attack fgsm --attack pgd --attack pgd_l2 --attack fmn --attack fmn_l2"

# Attacks on the models themselves, then images made on one and judged on the other.
lrrobust eval $PAIR --dataset "$VAL_A" $CHEAP --n "$N" --out "$RUNS/val_a" "$@"
# At the budget where robust accuracies differ most, the attack that finds most there.
lrrobust eval $PAIR --dataset "$VAL_A" --attack apgd_t_l2 --eps 0.2 --n "$N" --out "$RUNS/val_a" "$@"
lrrobust eval $PAIR --surrogate lr_resnet50 --surrogate resnet50 --dataset "$VAL_A" --attack pgd --n "$FEW" --out "$RUNS/transfer" "$@"
lrrobust eval $PAIR --dataset photos $CHEAP --n "$PHOTOS" --out "$RUNS/photos" "$@"
if [ -n "$COSTLY" ]; then
    for set in "$VAL_A" photos; do
        out=$([ "$set" = photos ] && echo photos || echo val_a)
        lrrobust eval $PAIR --dataset "$set" --attack cw --n "$FEW" --out "$RUNS/$out" "$@"
        lrrobust eval $PAIR --dataset "$set" --suite strong --n "$FEW" --out "$RUNS/$out" "$@"
        # Its own ladder has larger and smaller budgets.
        lrrobust eval $PAIR --dataset "$set" --suite strong_l2 --eps 0.2 --n "$FEW" --out "$RUNS/$out" "$@"
    done
    # What the attack written for LR-Nets breaks that pgd does not, on the LR-Net alone: no part of the comparison.
    lrrobust eval --model lr_resnet50 --dataset "$VAL_A" --attack pgd --attack pgd_adaptive --n "$FEW" --out "$RUNS/adaptive" "$@"
fi

# AutoAttack by its authors beside ours, on the same images at one budget; needs pip install --no-deps pyautoattack.
if [ -n "${WITH_AUTOATTACK:-}" ]; then
    lrrobust crosscheck $PAIR --dataset "$VAL_A" --suite strong --n "$FEW" --peer autoattack --peer-eps 1/255 \
        --runs "$RUNS/val_a" --out "$OUT/crosscheck"
fi

# Tiny-ImageNet's images are not ours to publish; the photos are (MIT licence), but would be most of their page's size.
lrrobust report "$RUNS/val_a" --out "$OUT/val_a" --no-gallery
# In a folder of its own: the few images that it needs are no verdict.
lrrobust report "$RUNS/transfer" --out "$RUNS/transfer/report" --no-gallery && cp "$RUNS/transfer/report/transfer.md" "$OUT/val_a"
if [ -n "$COSTLY" ]; then lrrobust report "$RUNS/adaptive" --out "$OUT/adaptive" --no-gallery; fi
lrrobust report "$RUNS/photos" --out "$OUT/photos" --no-gallery

# What is kept here is less than what reports hold: the worst cases and the curves against eps, all else of val_a/ in one archive; of
# adaptive/ the table and of photos/ that of worst cases.
sed -i.whole '/^!\[/d' "$OUT/val_a/robust_accuracy.md" && rm "$OUT/val_a/robust_accuracy.md.whole"
(cd "$OUT/val_a" && python3 -m tarfile -c report.tar.xz report.html comparisons.md robust_accuracy.md robust_accuracy.csv robust_accuracy.tex)
if [ -n "$COSTLY" ]; then
    sed -i.whole '/^!\[/d' "$OUT/adaptive/robust_accuracy.md" && rm "$OUT/adaptive/robust_accuracy.md.whole" "$OUT"/adaptive/*.png
fi
