"""Documents to calibrate on, and others to evaluate on: news articles and topics of the Python reference ("docs")."""

import re
from pydoc_data.topics import topics

import torch
from common import Reference, news_text, quick
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit.evaluate import log_probabilities, make_windows

# Topics that the methods' defaults were chosen on, and topics to calibrate on; all others are for evaluation.
CHOSEN_ON = {"assert", "assignment", "dict", "dynamic-features", "specialnames", "with"}
CALIBRATE_ON = re.findall(
    r"\S+",
    """
attribute-access attribute-references augassign booleans break callable-types calls comparisons compound customization
exprlists floating for formatstrings identifiers if import operator-summary pass power string-methods truth try types
typesmapping typesmethods typesmodules typesseq
""",
)


def articles() -> list[str]:
    """The news articles: every third from the first is what defaults were chosen on, from the second for evaluation,
    from the third for calibration."""
    return [line for line in news_text().splitlines() if line.strip()]


def calibration_documents() -> list[str]:
    """Documents to calibrate on."""
    return articles()[2::3] + [topics[name] for name in CALIBRATE_ON]


def evaluation_texts() -> dict[str, str]:
    """Texts by name, of documents that nothing was calibrated on and no default chosen on."""
    unseen = [topics[name] for name in sorted(topics) if name not in CHOSEN_ON.union(CALIBRATE_ON)]
    return {"news": "\n".join(articles()[1::3]), "docs": "\n".join(unseen)}


class HeldOut(Reference):
    """The float model's log-probabilities on ``text``."""

    def __init__(self, folder: str, text: str, limit: int, length: int = 512):
        self.windows = make_windows(AutoTokenizer.from_pretrained(folder), text, length, limit)
        model = quick(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        self.log_probabilities = [log_probabilities(model, window) for window in self.windows]
