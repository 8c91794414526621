"""How well do random features approximate softmax attention, and what does it depend on?"""

from xformers_lab.experiment import Claim, at_least, at_most, error, reported

CLAIM = Claim(
    says="Positive orthogonal features approximate softmax attention better the more there are, and worse the larger "
    "queries and keys are.",
    source="Choromanski et al., 2021, Performer (arXiv:2009.14794), figure 4 and theorem 2",
    literature="the mean squared error falls with the number of features, and is least for orthogonal positive ones",
    doubt="An error that falls with the features at a scale of 1.5 too: the variance grows as exp(|q|^2 + |k|^2).",
    minutes=1,
    seeds=5,
)
FEATURES, SCALES = (16, 64, 256), (0.5, 1.0, 1.5)
STUDIES = {
    "features": error(
        f"attention={','.join(f'performer:features={count}' for count in FEATURES)} seq_len=256 batch=4",
        scale=SCALES,
    )
}


def judge(tables):
    missed = lambda features, scale: tables["features"].value(
        "error", attention=f"performer:features={features}", scale=scale
    )
    return [
        at_most("error with 256 features at scale 0.5", missed(256, 0.5), 0.3),
        at_least("scale 0.5: error with 16 over that with 256", missed(16, 0.5) / missed(256, 0.5), 1.5),
        at_least("256 features: error at scale 1 over that at 0.5", missed(256, 1.0) / missed(256, 0.5), 2),
        *(reported(f"256 features at scale {scale:g}", missed(256, scale)) for scale in SCALES[1:]),
    ]
