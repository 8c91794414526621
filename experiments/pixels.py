"""Does it help to pretrain on the images of the task itself, without their labels?"""

from xformers_lab.experiment import Claim, at_least, compare, reported

CLAIM = Claim(
    says="Predicting hidden pixels of a task's own images, without more data, makes its classifier better.",
    source="Amos, Berant and Gupta, 2024, Never Train from Scratch (arXiv:2310.02980)",
    literature="Long Range Arena, images among its tasks: a plain Transformer that is pretrained on each task's own "
    "data matches S4, which beats one from scratch by far",
    doubt="Longer training with labels, and a rate for each arm: in pilots at a third of the rate, where both score "
    "less, there was nothing between them in the end. More pixels; several pretraining runs, where here one serves all "
    "seeds.",
    minutes=4,
    data={"mnist_t10k": "MNIST's 10,000 test images and their labels, idx files"},
)
# In 7 x 7 pixels. The images have no splits: 80 % train, 10 % validate, 10 % test.
IMAGES = "path=({data}/mnist_t10k):shrink=4"
MODEL = "position=learned seq_len=49 layers=2 dim=64 heads=2 batch=32 model=encoder"
STUDIES = {
    "hidden": compare(f"task=masked_pixels:{IMAGES}:rate=0.5 {MODEL} steps=1500 lr=4e-3"),
    "classes": compare(f"task=pixels:{IMAGES} {MODEL} init=none,{{hidden}} steps=400 lr=3e-3"),
}


def judge(tables):
    scratch, pretrained = (tables["classes"].metric(init=init) for init in tables["classes"].all("init"))
    return [
        at_least("pretrained less from scratch: accuracy", pretrained - scratch, 0.02),
        reported("from scratch", scratch),
        reported("pretrained", pretrained),
        reported("hidden pixels: bits", tables["hidden"].metric()),
    ]
