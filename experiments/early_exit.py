"""How many layers does early exit save where the model has learned its task, and at what loss?"""

from xformers_lab.experiment import Claim, at_least, at_most, compare, reported

CLAIM = Claim(
    says="Sure answers that leave early save a third of the layers with next to no loss; a lower threshold saves more.",
    source="Xin et al., 2020, DeeBERT (arXiv:2004.12993); Schuster et al., 2022, CALM (arXiv:2207.07061)",
    literature="DeeBERT: up to 40 % of inference time saved on GLUE with minimal degradation; CALM: up to 3 times as "
    "fast",
    doubt="A model of fewer layers that is as accurate: then no answer needed the layers that are saved.",
    minutes=5,
)
# With threshold=1 nothing leaves. Training does not look at the threshold, so the models of one seed are the same, and
# the sweep is over one model.
THRESHOLDS = (0.5, 0.8, 0.95, 1)
ARMS = ",".join(f"early_exit:threshold={threshold}" for threshold in THRESHOLDS)
STUDIES = {
    "thresholds": compare(
        f"task=brackets:depth=6 depth=fixed,{ARMS} position=rope seq_len=32 layers=4 dim=32 heads=2 batch=32 steps=400 "
        "lr=3e-3"
    )
}


def judge(tables):
    arm = lambda threshold: f"early_exit:threshold={threshold}"
    accuracy = {each: tables["thresholds"].metric(depth=arm(each)) for each in THRESHOLDS}
    layers = {each: tables["thresholds"].value("computation", depth=arm(each)) for each in THRESHOLDS}
    return [
        at_least("all layers: accuracy", accuracy[1], 0.9),
        at_least("threshold 0.95: share of layers saved", 1 - layers[0.95] / layers[1], 0.33),
        at_most("all layers less threshold 0.95: accuracy", accuracy[1] - accuracy[0.95], 0.02),
        at_least("threshold 0.95 less 0.5: layers", layers[0.95] - layers[0.5], 0),
        reported("fixed: accuracy", tables["thresholds"].metric(depth="fixed")),
        *(reported(f"threshold {each}: layers of 4", layers[each]) for each in THRESHOLDS),
        *(reported(f"threshold {each}: accuracy", accuracy[each]) for each in THRESHOLDS),
    ]
