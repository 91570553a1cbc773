"""Makes val-a.tar.xz, half of Tiny-ImageNet's validation set with 25 images of each class, out of the published archive.

    python reports/reference_pair/val_a.py tiny-imagenet-200.zip val-a.tar.xz

The archive is the one of Stanford's course CS231n, with `val/images/val_0.JPEG` and so on and `val/val_annotations.txt`.
"""

import base64
import io
import sys
import tarfile
import zipfile

#: Bit i (of byte i // 8, lowest first) says whether val_i.JPEG belongs to it.
CHOSEN = base64.b64decode("""
NvyGF8WvR87wkc066B8gVBsdGM/fEl+VLheD9/IFJ6AoB+oLzjcYqnMY5/WnlQehVaWyci3doGmn95W9oTQjW4xzZqzVoDcVl6zbZVtS/Kfy2hLQMAP0+HAJ
FzES1Uy/zrtE+gpt0mEXQBJrHuaSZapx2Q0GnEy4hBc/9rXynPcmHfqiDm78D6cup6oFd/UetPh3sOMjbfLhrMjI7pssJ/TCN2MWEtfbYtCYhbWUXhApjRZB
FlavQj/24Pbd+y57TbFMMwSPZtoPmTloS/+UgLHnSoKxv1QOD0KM1VVSq40VjR1IszFT2rPNv1ZfDgRxa3eqavmjSLGUwuLGdGXW2el5bxRfTHq+6pZLi0TK
vpLtEYawNh8vayZS//HEPOP9TfY2p915sS++OmUmbtboAAMhels53jBJ24XR/Sca0iZoTWGLfVHMxzlarn+Byl0xLlcN39GKq66OttVIVYcTuLUJdG6Pe74x
K6xTH3ZNJzKwp6m3houvlTK4h9qHvJcsznBNliXpSJVl/inMVgBESJUAXHRWHVfskZKamgVom3YB0caM1OINnLInaTZhxatxxSgcJ5LVoElVvFBEDi0C1/nw
QLfkHA2pxmCrRzjTNbT8/Z+9iaF3ftlOiCNoE3PulAX0ZztLmrmH0wpwWeuPNaklhKmZVEPGEO3FOrGZpX1punWP2QNSSwIVlDTA4i41G3cXJvp27MCx06Rg
RQjhYWtCcZG8hQwnP/LKcUqLvmFOk+vrNhEH08TFJeh52HeBga3X05dVjK8hqsbZpGbOM+QDDvOZ+ROBqjfcX41w5Hqnb6YwaNxEBp7lbrgsquMs00uMf8b6
RiLAsgi0cwsgnI2Hb3GEmJ2gOjoWegpjPmH7RzBu6v8SNuV2iz3VGZblutOXs4PwWRZyLToowGPLwo/aqR0gCk7HELbqCnf6Hss5ZGHg4Zwh9T0Yz2yNyOSS
88aUSmSK8jqywzur5gnHwAGEp+DyUxy9ZIua+ZgTttRRfSkE8UQ0sYk5yE2uuj1ziGi/5qRJJw1XZ+YjrGxtoKVGoxiedOtpURlzJsIgbB0Ba5XmUCal0SHT
1ZNSHPIJeJwbGf7W+YtYsMK38tpG/QeYOshXcAni3QfMmxphtiXau3VFhvkh0kW4uiEiZXA4dixSxmpV62voK1bLh+LAMEbac2WSoi4Yd6XUxheNjIBH7Z9P
Og/5bBpPIbILyVCfIEDr2hfPfFHougZIXz+D6qj0hP1Zek+FHccYoioGo2E6LB6FNTsXdrFADja7s3XG/SZHw6xBdKyOlnf29dXwVQXhd95uu4uAF1vBgl9G
YpjFajbrQWXeNCFZuwt/Xjd3Cw4eWl2gEm34Tspn69NyRIsx2+IxjxtovqdJy+RYxbnldZWr6xsnnRFuBSOIkEy9wZsmXCONK2ki20T139TofuOY8tkI2MqI
mcXdk79p3vgKzPtJFs0RKRzDXy5S68LJGT18U6PXxtyQHq3cgMrCk6E7lrDvPu13bJfhJ0GowRZkBR6inPQc5VIGrHr2DvTpVxVK5yrNatVjZ2nPZ/O0eQAP
V49avS0dRUQKMpZB2yhUQxL7UaIuU9fXJlzAF8Oy/KlSJk4IW/pyX+wiMVtPQ2+A6PRa1AutZcIEjbGDKs+R/vtUuQ+inlwA69WYQKBddEk=
""")


def main(source: str, target: str) -> None:
    root = "tiny-imagenet-200/val"
    with zipfile.ZipFile(source) as archive:
        annotations = archive.read(f"{root}/val_annotations.txt").decode().splitlines()
        wnids = dict(line.split("\t")[:2] for line in annotations if line)
        names = [f"val_{i}.JPEG" for i in range(8 * len(CHOSEN)) if CHOSEN[i // 8] >> i % 8 & 1]
        with tarfile.open(target, "x:xz") as out:
            for wnid, name in sorted((wnids[name], name) for name in names):
                content = archive.read(f"{root}/images/{name}")
                entry = tarfile.TarInfo(f"val/{wnid}/{name}")
                entry.size = len(content)
                out.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python val_a.py tiny-imagenet-200.zip val-a.tar.xz")
    main(*sys.argv[1:])
