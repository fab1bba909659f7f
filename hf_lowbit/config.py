"""What the user says: :class:`LowBitConfig`, validated before any long work."""

import copy
import dataclasses
import difflib
import importlib.util
import math
import re
from typing import Any

from transformers.utils.quantization_config import MetalConfig

from .backends import check_backend
from .budgets import Folder, check_folder, read_budgets
from .compensation import resolve_compensation
from .formats import FORMATS, Format, OutlierFormat, RotatedFormat, parse_format
from .formats.nested import SMALLEST
from .formats.rotated import FOLDED, TRANSFORMS
from .low_rank import LowRank, parse_low_rank
from .methods import BEST, BlockMethod, Method, make_method, method_options, methods, preprocessing
from .version import __version__

QUANT_METHOD = "lowbit"
LOADING_OPTIONS = ("dequantize", "backend", "activations", "storage", "max_memory_bytes", "offload_folder", "load_bits")
ACTIVATIONS = ("float", "int8")
BUDGETED = ("int", "nf", "codebook")  # formats whose width a budget may choose
STORAGES = ("raw", "entropy", "zstd")
# Options that a rule may change for the layers that it matches.
LAYER_OPTIONS = (
    "bits",
    "format",
    "method",
    "group_size",
    "symmetric",
    "zeros",
    "scale_dtype",
    "codebook",
    "method_options",
    "bits_stored",
    "transform",
    "preprocess",
    "outliers",
    "compensation",
    "compensation_rank",
)
BEST_RATE_AWARE, BITS_IN_MEMORY = "ecsq", 8
_FORMAT_OPTIONS = ("group_size", "symmetric", "zeros", "scale_dtype", "codebook")


def _ordered(rules) -> dict[str, dict[str, Any] | None]:
    """Rules as a dict in their order; raises ``ValueError`` for anything but a dict or pairs."""
    pairs = list(rules.items()) if isinstance(rules, dict) else rules or []
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
    ):
        raise ValueError(f"rules={rules!r} must be a dict of regular expressions, in order")
    return dict(pairs)


def _rate(options: dict[str, Any]) -> dict[str, Any]:
    """The option of the method that ``bits_stored`` stands for; raises ``ValueError`` for a method without it."""
    method, bits_stored = options["method"], options["bits_stored"]
    if bits_stored is None:
        if method == BEST_RATE_AWARE:
            raise ValueError(
                f"method {method!r} needs to know how many bits it may take: give bits_stored=, such as 3.0"
            )
        return {}
    if method in methods() and "bits_stored" not in method_options(method):
        able = sorted(name for name in methods() if "bits_stored" in method_options(name))
        raise ValueError(
            f"method {method!r} cannot aim at bits_stored={bits_stored!r}: use {' or '.join(map(repr, able))}"
        )
    return {"bits_stored": bits_stored}


def is_fraction(bits: Any) -> bool:
    """Whether ``bits`` is a budget and not a width."""
    return isinstance(bits, float) and bits != int(bits) and bits != 1.58


def _is_record(calibration: Any) -> bool:
    """Whether ``calibration`` is what a packed repo says of one, not data to calibrate on."""
    return isinstance(calibration, dict) and "sha256" in calibration


def bits_in_memory(bits_stored: Any, method: str | None) -> int:
    """The width of codes where only ``bits_stored`` is given: hardly a row gets a wider step for it."""
    known = isinstance(bits_stored, (int, float)) and 0 < bits_stored < BITS_IN_MEMORY
    return (
        min(BITS_IN_MEMORY, math.ceil(bits_stored) + 2)
        if known and method in (None, BEST_RATE_AWARE)
        else BITS_IN_MEMORY
    )


class LowBitConfig(MetalConfig):
    """How to quantize a model, or how to load one that is packed already.

    Args:
        bits: 1 to 8, or 1.58 for ternary weights; 4 by default, 8 for "nested". Any other fraction is a budget: bits
            per weight, everything counted, for the layers that no rule speaks of, embedding and head aside; widths of 2
            to 8 for each are searched, by what they harm on ``calibration``. The
            name of a file from ``hf-lowbit plan`` replays what was found before.
        format: "int" (default), "nf", "fp4", "codebook", "ternary", or "nested" for codes whose first bits are codes
            too, of which ``load_bits`` reads as many as are wanted; see ``docs/format.md``.
        method: "rtn", "hqq", "lloyd" or, with calibration, "gptq", "awq" or "signround"; by default the best measured
            one for the format.
        group_size: Consecutive inputs that share a scale: 16 to 1024 by powers of two, or "row". Default 32 for
            "int" and "fp4", "row" for "ternary" and for a codebook per row, otherwise 64 (also where "int" is
            symmetric or made by "hqq").
        symmetric: For "int": no zero points. Default False, but True at 1 bit.
        zeros: For "int": zero points as "int" (default) or "float"; "float" is the default of method "hqq".
        scale_dtype: "float16", "bfloat16", "float32", "log8", "e8m0" or "e4m3"; the default depends on the format.
        codebook: For "codebook": one table per "tensor" (default) or "row".
        bits_stored: Bits per weight that packed linears are to take once they are entropy-coded, 0.5 to 7, such as 3.0.
            The method is then "ecsq", which needs no data, unless you name "gptq", and ``bits`` the width of the codes
            in memory: by default 8 for "gptq", and for "ecsq" the next whole number and two. A rule that names ``bits``
            alone asks for a fixed width.
        transform: "hadamard" to rotate what each packed linear layer reads, so that no weight stands out (see
            ``docs/methods.md``), "hadamard-folded" to rotate the residual stream of a decoder instead wherever that
            spares the rotation at run time (with calibration), or None (default). A rule takes "none" to leave layers
            as they are.
        preprocess: "magr" to make the largest weights smaller where the layer's output hardly depends on it, before the
            method chooses codes; needs ``calibration``. "magr:1e-4" gives its strength (default 1e-5, for "gptq"; see
            ``docs/methods.md``). Default None; a rule takes "none".
        outliers: Percentage of the columns of each packed linear layer that are kept in float16 beside the codes, above
            0 and at most 10; by default none. A rule takes 0 for none.
        compensation: "eora" to keep beside each packed linear layer a correction of low rank, the best one for the
            inputs that ``calibration`` shows (see ``docs/methods.md``), or None (default). A rule takes "none" to leave
            layers without.
        compensation_rank: Rank of the corrections, 16 by default; each costs 16 bits times the rank for every input and
            every output of its layer, which bits per weight count.
        storage: How ``save_pretrained`` stores tensors: "raw" (default), or "entropy" or "zstd", coded without loss,
            see ``docs/format.md``. A repo may be loaded with any, whatever it is stored as.
        method_options: Options of the method, such as ``{"range": "minmax"}`` for "rtn".
        calibration: What methods that need it ("gptq") look at: a :class:`~hf_lowbit.calibration.Calibration`, or
            texts, token ids, a file or the name of a data set. It is not saved; a packed repo has a record of it (kind,
            number of windows, hash).
        rules: Ordered regular expressions over whole module names, each with a dict of the options above that differ
            for the modules it matches, or None to keep them in float. The first match decides. Embeddings of
            positions and the like, and heads of classifiers, kept by default, are packed where a rule asks for it.
            Pairs in a list mean the same.
        embeddings: Bits of the input embedding and the output head, packed as integers: 8 (default) to 1; or "float" to
            keep them, for instance to add tokens, to train them, or for trainers that read the head's weight (TRL). A
            rule that names one of them comes first, and tied ones share one packed tensor. "float" works for a packed
            repo too: they are dequantized after loading.
        modules_to_not_convert: Names to keep in float, as in other quantization configs; replaces the default (output
            heads, tied weights).
        dequantize: Loading option: give back a plain model in float.
        backend: Loading option: "auto", "torch", "triton" or "native".
        activations: Loading option: "float" (default), or "int8": on CPUs, packed linears round what comes in to 8
            bits, a scale for every token and group, and multiply integers. Faster and less exact: see ``docs/cpu.md``.
        load_bits: Loading option for a nested repo (``format="nested"``): the width to load, 2 to what it holds, which
            is the default. Planes of more bits are not read, and the model is an ordinary one of that width.
        max_memory_bytes: Loading option for a packed repo: the most that its weights may take in memory, in bytes or as
            "300MB", or by device, ``{"cpu": "300MB", 0: "2GB"}``, to compute on accelerators. Decoder layers that do
            not fit are read from disk when their turn comes: see ``docs/streaming.md``.
        offload_folder: Loading option beside ``max_memory_bytes``: where coded layers may be laid decoded, for as long
            as the model lives, if this disk gives them sooner than they can be decoded. By default a folder beside the
            Hub's cache; False writes nothing.

    Loading options are honoured for a packed repo; everything else then comes from the repo, and a contradiction is
    an error.

    Raises:
        ValueError: for any value or combination that cannot work, naming the value and the cure.
    """

    # MetalConfig is the base only because transformers takes loading options from a fixed list of config classes
    # (LOADING_ATTRIBUTES_CONFIG_TYPES); of those it is the smallest, and nothing else in transformers asks for it.

    def __init__(
        self,
        bits: float | str | None = None,
        format: str | None = None,
        method: str | None = None,
        group_size: int | str | None = None,
        symmetric: bool | None = None,
        zeros: str | None = None,
        scale_dtype: str | None = None,
        codebook: str | None = None,
        bits_stored: float | None = None,
        transform: str | None = None,
        preprocess: str | None = None,
        outliers: float | None = None,
        compensation: str | None = None,
        compensation_rank: int | None = None,
        method_options: dict[str, Any] | None = None,
        calibration: Any = None,
        rules: dict[str, dict[str, Any] | None] | list[tuple[str, dict[str, Any] | None]] | None = None,
        embeddings: int | str | None = None,
        modules_to_not_convert: list[str] | None = None,
        dequantize: bool | None = None,
        backend: str | None = None,
        activations: str | None = None,
        storage: str | None = None,
        max_memory_bytes: int | str | dict[int | str, int | str] | None = None,
        offload_folder: Folder = None,
        load_bits: int | None = None,
        **kwargs: Any,
    ):
        if calibration is not None and not _is_record(calibration):
            from .calibration.data import Calibration  # whose package imports this module

            calibration = Calibration.of(calibration)
        arguments = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__", "Calibration")}
        saved = {key: kwargs.pop(key, None) for key in ("layers", "low_rank", "folded", "version")}
        kwargs.pop("quant_method", None)
        if kwargs:
            option = next(iter(kwargs))
            close = difflib.get_close_matches(option, arguments, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f": it takes {', '.join(arguments)}"
            raise ValueError(f"LowBitConfig has no option {option!r}{hint}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers takes any string
        self.layers: dict[str, str] | None = saved["layers"]
        self.low_rank: dict[str, str] | None = saved["low_rank"]
        self.folded: dict[str, str] | None = saved["folded"]  # layers whose factors went into another module, and which
        self.version: str = saved["version"] or __version__
        self.given = {k: copy.deepcopy(v) for k, v in arguments.items() if v is not None}
        if rules is not None:
            self.given["rules"] = _ordered(rules)
        self.allocation: dict[str, int] | None = None  # widths by layer, under a budget
        if isinstance(bits, str) and bits.endswith(".json"):
            from .allocation.allocation import read_allocation  # whose package imports this module

            found = read_allocation(bits)
            bits, self.allocation = found.budget, found.layers
            self.given["bits"] = bits
        self.requested: dict[str, Any] | None = None  # of a user's config, when this one came from a packed repo

        self.bits_stored = bits_stored
        default = 4 if bits_stored is None and format != "nested" else bits_in_memory(bits_stored, method)
        self.bits = default if bits is None else bits  # type: ignore[assignment]
        self.format = format or ("ternary" if self.bits == 1.58 else "int")
        self.method = method or (BEST.get(self.format, "rtn") if bits_stored is None else BEST_RATE_AWARE)
        self.group_size = group_size  # type: ignore[assignment]
        self.symmetric, self.zeros, self.scale_dtype, self.codebook = symmetric, zeros, scale_dtype, codebook
        self.transform, self.preprocess, self.outliers = transform, preprocess, outliers
        self.compensation, self.compensation_rank = compensation, compensation_rank
        self.method_options = method_options or {}
        self.calibration = calibration
        self.rules = _ordered(rules)
        # Repos that were packed before there was this option kept them.
        self.embeddings = ("float" if self.layers is not None else 8) if embeddings is None else embeddings
        self.modules_to_not_convert = modules_to_not_convert
        self.dequantize = bool(dequantize)
        self.backend = check_backend(backend or "auto")
        self.activations = activations or "float"
        self.storage = storage or "raw"
        self.max_memory_bytes, self.offload_folder = max_memory_bytes, offload_folder
        self.load_bits = load_bits
        self.post_init()

    def post_init(self) -> None:
        """Checks every option and every rule by building what it asks for."""
        self.resolve()
        self.resolve_compensation()
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations={self.activations!r} is unknown: use 'float' or 'int8'")
        if self.storage not in STORAGES:
            raise ValueError(f"storage={self.storage!r} is unknown: use {', '.join(map(repr, STORAGES))}")
        if self.storage == "zstd" and importlib.util.find_spec("zstandard") is None:
            raise ValueError("storage='zstd' needs the zstandard library: pip install zstandard, or take 'entropy'")
        if self.load_bits is not None and (
            self.load_bits not in range(SMALLEST, 9) or isinstance(self.load_bits, bool)
        ):
            raise ValueError(f"load_bits={self.load_bits!r} is not possible: use {SMALLEST} to 8, for a nested repo")
        if self.dequantize and self.activations == "int8":
            raise ValueError("activations='int8' needs packed weights: drop it, or dequantize=True")
        if self.dequantize and self.max_memory_bytes is not None:
            raise ValueError("max_memory_bytes= keeps weights packed on disk: drop it, or dequantize=True")
        read_budgets(self.max_memory_bytes)
        check_folder(self.offload_folder)
        if self.offload_folder is not None and self.max_memory_bytes is None:
            raise ValueError("offload_folder= is for models under max_memory_bytes=: give that too, or leave it out")
        if self.embeddings != "float":
            if self.embeddings not in range(1, 9) or isinstance(self.embeddings, bool):
                raise ValueError(f"embeddings={self.embeddings!r} is not possible: use 1 to 8 bits, or 'float'")
            self.resolve(self.embedding_options())
        for pattern, options in self.rules.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None
            if options is None:
                continue
            if not isinstance(options, dict):
                raise ValueError(f"rule {pattern!r} must be a dict of options or None (keep in float), not {options!r}")
            for option in options:
                if option not in LAYER_OPTIONS:
                    raise ValueError(f"rule {pattern!r} has no option {option!r}: it takes {', '.join(LAYER_OPTIONS)}")
            if options.get("transform") == FOLDED:
                raise ValueError(
                    f"rule {pattern!r}: transform={FOLDED!r} is for the whole model: give it outside of rules"
                )
            try:
                self.resolve(options)
                self.resolve_compensation(options)
            except ValueError as error:
                raise ValueError(f"rule {pattern!r}: {error}") from None
        if self.transform == FOLDED and (self.bits_stored is not None or not self.needs_calibration):
            raise ValueError(
                f"transform={FOLDED!r} needs a method with calibration, such as 'gptq', and does not go with "
                "bits_stored=: use transform='hadamard' or another method"
            )
        for text in (self.layers or {}).values():
            parse_format(text)
        for text in (self.low_rank or {}).values():
            parse_low_rank(text)

    @property
    def needs_calibration(self) -> bool:
        """Whether the method or the compensation, or the one of a rule, needs calibration."""
        wishes = [None, *(options for options in self.rules.values() if options is not None)]
        return any(
            self.resolve(options)[1].needs_calibration or self.resolve_compensation(options) is not None
            for options in wishes
        )

    def check_calibration(self) -> None:
        """Compares what the methods need with the calibration that is there.

        Raises:
            ValueError: if calibration is missing, or would not be looked at.
        """
        given = self.calibration is not None and not _is_record(self.calibration)
        if self.needs_calibration and not given:
            method, who = self.resolve()[1], f"method {self.method!r} (or one of the rules)"
            if not type(method).needs_calibration and method.preprocess is not None:
                who = f"preprocess={method.preprocess!r}"
            elif not method.needs_calibration and self.resolve_compensation() is not None:
                who = f"compensation={self.compensation!r}"
            raise ValueError(f"{who} needs calibration data: give calibration=, such as a list of texts")
        if given and not self.needs_calibration and not self.seeks_allocation:
            able = sorted(name for name, method in methods().items() if method.needs_calibration)
            raise ValueError(
                f"method {self.method!r} looks at weights alone: drop calibration=, or use "
                f"{' or '.join(map(repr, able))}"
            )

    @property
    def seeks_allocation(self) -> bool:
        """Whether ``bits`` is a budget for which widths are still to be found."""
        return is_fraction(self.bits) and self.allocation is None and self.layers is None

    def embedding_options(self) -> dict[str, Any]:
        """What a rule for the input embedding and the output head would say, where they are packed by default."""
        options: dict[str, Any] = {"format": "int", "bits": self.embeddings, "transform": None, "outliers": None}
        options["preprocess"] = None
        options |= {"compensation": None, "compensation_rank": None}
        if methods()[self.method].needs_calibration:  # which does not reach them
            options |= {"method": BEST["int"], "method_options": {}}
        return options

    def resolve(self, overrides: dict[str, Any] | None = None) -> tuple[Format, Method]:
        """The format and the method that these options, changed by ``overrides`` (a rule), stand for."""
        options = {k: getattr(self, k) for k in LAYER_OPTIONS}
        if overrides:
            # Another width or format leaves the old format's defaults behind.
            options.update(overrides)
            if "format" not in overrides and "bits" in overrides and 1.58 in (overrides["bits"], self.bits):
                options["format"] = "ternary" if overrides["bits"] == 1.58 else "int"
            if options["format"] != self.format:
                for key in _FORMAT_OPTIONS:
                    options[key] = overrides.get(key)
            if "bits_stored" not in overrides and {"bits", "format", "method"} & overrides.keys():
                options["bits_stored"] = None  # a fixed width, for this layer
            gone = (options["bits_stored"] is None) != (self.bits_stored is None)
            able = options["method"] in methods() and "bits_stored" in method_options(options["method"])
            unfit = options["method"] == BEST_RATE_AWARE if options["bits_stored"] is None else not able
            if "method" not in overrides and (options["format"] != self.format or (gone and unfit)):
                fixed = BEST.get(options["format"], "rtn")
                options["method"] = fixed if options["bits_stored"] is None else BEST_RATE_AWARE
                options["method_options"] = overrides.get("method_options") or {}
            free = gone or ("bits_stored" in overrides and "bits" not in self.given)
            if free and "bits" not in overrides:
                stored = options["bits_stored"]
                options["bits"] = 4 if stored is None else bits_in_memory(stored, options["method"])
        bits, format_name, method_name = options["bits"], options["format"], options["method"]
        options["method_options"] = {**options["method_options"], **_rate(options)}
        stored = options["bits_stored"] is not None and method_name != BEST_RATE_AWARE
        integers = format_name == "int" and not stored
        makes = methods()[method_name].formats if method_name in methods() else ()
        if format_name == "int" and (stored or ("int_columns" in makes and "int" not in makes)):
            format_name = "int_columns"
        rotated = options["transform"] not in (None, "none")
        if rotated and options["transform"] not in TRANSFORMS:
            raise ValueError(f"transform={options['transform']!r} is unknown: use {' or '.join(map(repr, TRANSFORMS))}")
        outliers = options["outliers"]
        if outliers and (format_name == "nested" or options["bits_stored"] is not None):
            raise ValueError(f"outliers={outliers!r} does not go with format 'nested' or bits_stored=: drop one")
        if outliers and method_name in methods() and issubclass(methods()[method_name], BlockMethod):
            raise ValueError(f"outliers={outliers!r} does not go with method {method_name!r}, which trains blocks")
        preprocess = None if options["preprocess"] == "none" else options["preprocess"]
        if preprocess is not None:
            preprocessing(preprocess)  # which checks it
        if preprocess and (options["bits_stored"] is not None or format_name == "nested"):
            which = "format 'nested', whose levels are learned" if format_name == "nested" else "bits_stored="
            which += ", whose grid has no range to make smaller" if format_name != "nested" else ""
            raise ValueError(f"preprocess={preprocess!r} does not go with {which}: drop one")
        if rotated and format_name == "nested":
            raise ValueError("format 'nested' takes no transform: drop one of the two")
        if format_name not in FORMATS:
            raise ValueError(f"format={format_name!r} is unknown: use one of {', '.join(FORMATS)}")
        if isinstance(bits, bool) or not isinstance(bits, (int, float)):
            raise ValueError(f"bits={bits!r} is not a number: use bits=1 to 8, or 1.58 for ternary weights")
        if not 1 <= bits <= 8:
            raise ValueError(f"bits={bits!r} is out of range: use bits=1 to 8, or 1.58 for ternary weights")
        if is_fraction(bits):
            if overrides and "bits" in overrides:
                raise ValueError(f"bits={bits!r} is a budget, which is for the whole model: use a whole number here")
            if options["format"] not in BUDGETED or options["bits_stored"] is not None:
                raise ValueError(
                    f"bits={bits!r} is a budget, which needs formats of several widths: use "
                    f"{' or '.join(map(repr, BUDGETED))}, without bits_stored="
                )
            bits = math.ceil(bits)  # stands for any of them
        cls = FORMATS[format_name]
        arguments: dict[str, Any] = {"bits": bits if bits == 1.58 else int(bits)}
        known = {f.name for f in dataclasses.fields(cls)}
        for key in _FORMAT_OPTIONS:
            if options[key] is None:
                continue
            if key not in known:
                raise ValueError(f"format {format_name!r} has no option {key!r}")
            arguments[key] = options[key]
        if arguments.get("group_size") == "row":
            arguments["group_size"] = -1
        elif "group_size" in arguments and (
            isinstance(arguments["group_size"], (bool, str)) or arguments["group_size"] == 0
        ):
            raise ValueError(f"group_size={options['group_size']!r} is not possible: use a power of two, or 'row'")
        if integers:
            if method_name == BEST_RATE_AWARE:
                arguments = {"group_size": -1, "symmetric": True, **arguments}
            arguments.setdefault("symmetric", arguments["bits"] == 1)
            if arguments["symmetric"] and options["zeros"] is not None:
                raise ValueError("a symmetric grid has no zero points: drop zeros=, or use symmetric=False")
            if method_name == "hqq" and not arguments["symmetric"]:
                arguments.setdefault("zeros", "float")
            elif not arguments["symmetric"]:
                # 14 to 22 % less KL than groups of 64 with 16-bit scales, for 0.03 to 0.06 bits more (docs/methods.md).
                arguments.setdefault("group_size", 32)
                arguments.setdefault("scale_dtype", "log8")
            arguments.setdefault("group_size", 64)
        if format_name == "codebook" and arguments.get("codebook") == "row":
            arguments.setdefault("group_size", -1)
        if method_name not in methods():
            raise ValueError(f"method={method_name!r} is unknown: use one of {', '.join(sorted(methods()))}")
        if format_name not in methods()[method_name].formats:
            fitting = sorted(n for n, m in methods().items() if format_name in m.formats)
            raise ValueError(
                f"method {method_name!r} does not make format {format_name!r}: use {' or '.join(map(repr, fitting))}"
            )
        method = make_method(method_name, options["method_options"])
        if preprocess:
            method.preprocess, method.needs_calibration = preprocess, True  # type: ignore[misc]  # of this instance
        try:
            format = cls(**arguments)
            method.check(format)
            format = RotatedFormat(stored=format) if rotated else format
            return (OutlierFormat(stored=format, percent=outliers) if outliers else format), method
        except TypeError as error:
            raise ValueError(f"options {arguments} do not fit format {format_name!r}: {error}") from None

    def resolve_compensation(self, overrides: dict[str, Any] | None = None) -> LowRank | None:
        """The correction that these options, changed by ``overrides`` (a rule), ask for beside a layer."""
        return resolve_compensation(self, overrides)

    # -- transformers' side --------------------------------------------------------------------------------------------

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers copies from a user's config onto the one of a packed repo."""
        options = {k: getattr(self, k) for k in LOADING_OPTIONS if k in self.given}
        requested = {k: v for k, v in self.given.items() if k not in (*LOADING_OPTIONS, "calibration")}
        return {**options, "requested": requested}

    @property
    def unpacks_embeddings(self) -> bool:
        """Whether the embedding and the head of a packed repo are to be dequantized after loading."""
        return (self.requested or {}).get("embeddings") == "float" != self.embeddings

    def check_requested(self) -> None:
        """Compares a packed repo's settings with what the user asked for when loading it.

        Raises:
            ValueError: naming each setting that differs.
        """
        differences = [
            f"{key}={wanted!r} (the repo has {getattr(self, key)!r})"
            for key, wanted in (self.requested or {}).items()
            if (getattr(self, key) != wanted or (key == "rules" and list(self.rules) != list(wanted)))
            and not (key == "embeddings" and self.unpacks_embeddings)
        ]
        if differences:
            raise ValueError(
                f"this repo is packed already, with other settings than you ask for: {', '.join(differences)}. Load it "
                "without these options, or quantize the original model"
            )

    def to_dict(self) -> dict[str, Any]:
        """What is saved in ``config.json``: the settings that were given or resolved, without loading options."""
        saved = {
            "quant_method": self.quant_method,
            "version": self.version,
            "bits": self.bits,
            "format": self.format,
            "method": self.method,
            "layers": self.layers,
            "low_rank": self.low_rank,
            "folded": self.folded,
        }
        others = (
            "bits_stored",
            "transform",
            "outliers",
            "compensation",
            "compensation_rank",
            "preprocess",
            "method_options",
            "rules",
        )
        for key in (*_FORMAT_OPTIONS, *others, "embeddings", "modules_to_not_convert"):
            saved[key] = getattr(self, key)
        if _is_record(self.calibration):
            saved["calibration"] = self.calibration
        saved["storage"] = None if self.storage == "raw" else self.storage
        saved["rules"] = [[pattern, options] for pattern, options in self.rules.items()]  # JSON would sort a dict
        optional = ("layers", "low_rank", "folded", "method_options", "rules")
        return {k: copy.deepcopy(v) for k, v in saved.items() if v is not None and (v or k not in optional)}

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """A config from :meth:`to_dict`'s result; refuses settings of a version that this one does not know."""
        try:
            return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        except ValueError as error:
            version = config_dict.get("version", __version__)
            if version == __version__:
                raise
            raise ValueError(f"this repo was packed by hf_lowbit {version}, this is {__version__}: {error}") from error
