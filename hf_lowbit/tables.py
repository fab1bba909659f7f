"""Results of the commands as tables: one function for each command of :mod:`.cli` that prints its dict."""

import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def _table(*columns: str, title: str | None = None) -> Table:
    """A table whose columns are left-aligned where they begin with ``<``, else right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        right = not column.startswith("<")
        table.add_column(column.lstrip("<"), justify="right" if right else "left", no_wrap=right)
    return table


def _row(table: Table, *cells) -> None:
    table.add_row(*(escape(str(cell)) for cell in cells))


def megabytes(count: int) -> str:
    """``count`` bytes as text in MB of a million bytes."""
    return f"{count / 1e6:.2f}"


def _wildcard(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if error is None or error != error else f"{value:.{digits}f} ± {error:.{digits}f}"


def _kept(console: Console, kept: list[dict]) -> None:
    table = _table("<kept in float", "MB", "<reason")
    rows: dict[tuple[str, str], int] = {}
    for entry in kept:
        key = (_wildcard(entry["name"]), entry["reason"])
        rows[key] = rows.get(key, 0) + entry["bytes"]
    for (name, reason), size in sorted(rows.items(), key=lambda item: -item[1]):
        _row(table, name, megabytes(size), reason)
    console.print(table)


def quantize(console: Console, result: dict, arguments: dict) -> None:
    _kept(console, result["kept"])
    if result["calibrated_modules"]:
        console.print(
            f"{result['calibrated_modules']} modules calibrated, each on at least {result['fewest_tokens']} tokens",
            highlight=False,
        )
    console.print(
        f"{result['destination']}: {result['packed_modules']} modules packed, "
        f"{result['packed_weights'] / 1e6:.1f} M weights in {megabytes(result['packed_bytes'])} MB "
        f"({result['bits_per_packed_weight']:.2f} bits per weight); {megabytes(result['kept_bytes'])} MB kept in "
        f"float; {result['seconds']:.1f} s",
        soft_wrap=True,
        highlight=False,
    )


def _measured(layers: list[dict], columns: tuple[str, ...]) -> list[str]:
    """Entropy and coded size in bits a code, of all ``layers`` together, and by how much the one is above the other."""
    if not columns:
        return []
    if any(layer["entropy"] is None for layer in layers):
        return ["?"] * len(columns)
    codes = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    entropy, coded = (
        sum(n * layer[key] for n, layer in zip(codes, layers, strict=True)) / sum(codes)
        for key in ("entropy", "coded_bits")
    )
    return [f"{entropy:.3f}", f"{coded:.3f}", f"{coded / entropy - 1:.2%}" if entropy else "?"]


def plan(console: Console, result: dict, arguments: dict) -> None:
    widths = sorted(set(result["layers"].values()))
    table = _table("<layers", *(f"{bits} bits" for bits in widths))
    rows: dict[str, dict[int, list[str]]] = {}
    for name, bits in result["layers"].items():
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        rows.setdefault(_wildcard(name), {}).setdefault(bits, []).append(number[0] if number else "all")
    for name, by in rows.items():
        _row(table, name, *(" ".join(by.get(bits, [])) for bits in widths))
    console.print(table)
    uniform = ", ".join(
        f"{bits} bits everywhere ({bpw:.2f}): {harm:.4g}" for bits, (bpw, harm) in result["uniform"].items()
    )
    console.print(
        f"{result['output']}: {result['bits_per_weight']:.3f} bits per weight of {result['budget']}; "
        f"divergences of layers in sum {result['damage']:.4g}; {uniform}",
        highlight=False,
    )


def inspect(console: Console, result: dict, arguments: dict) -> None:
    groups: dict[tuple, list[dict]] = {}
    for layer in result["layers"]:
        key = (layer["name"] if arguments["every"] else _wildcard(layer["name"]), layer["format"], str(layer["shape"]))
        groups.setdefault(key, []).append(layer)
    measured = ("entropy", "coded", "above") if arguments["entropy"] else ()
    table = _table("<layer", "count", "<format", "bits", "bits per weight", "shape", "MB", "stored MB", *measured)
    for (name, format, _), layers in groups.items():
        bits, shape = layers[0]["bits_per_weight"], layers[0]["shape"]
        bits, shape = "?" if bits is None else f"{bits:.3f}", "?" if shape is None else "x".join(map(str, shape))
        size = megabytes(sum(layer["bytes"] for layer in layers))
        stored = megabytes(sum(layer["stored_bytes"] for layer in layers))
        _row(
            table, name, len(layers), format, layers[0]["bits"], bits, shape, size, stored, *_measured(layers, measured)
        )
    console.print(table)
    _kept(console, result["kept"])
    totals = _table("<total", "value")
    for key, value in result["totals"].items():
        _row(totals, key.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else value)
    console.print(totals)
    if result.get("note"):
        console.print(result["note"], soft_wrap=True, highlight=False, markup=False)


def compress(console: Console, result: dict, arguments: dict) -> None:
    before, after = result["bytes_before"], result["bytes_after"]
    console.print(
        f"{result['destination']}: {megabytes(after)} MB stored as {result['storage']}, {after / before:.1%} of the "
        f"source's {megabytes(before)} MB",
        soft_wrap=True,
        highlight=False,
    )
    if "fraction" in result:
        console.print(
            f"{result['fraction']:.0%} of what coding makes smaller in layers is coded: the disk was read at "
            f"{result['disk'] / 1e9:.2f} GB/s, {result['decoding'] / 1e9:.2f} GB/s were decoded, and computing a token "
            f"took {1e3 * result['computing_s']:.0f} ms",
            soft_wrap=True,
            highlight=False,
        )


decompress = compress


def generate(console: Console, result: dict, arguments: dict) -> None:
    rate = result["tokens"] / result["seconds"]
    Console(stderr=True).print(
        f"{result['tokens']} tokens in {result['seconds']:.1f} s ({rate:.1f} per second, reading the prompt included)",
        style="dim",
        highlight=False,
    )


def evaluate(console: Console, result: dict, arguments: dict) -> None:
    table = _table("<measure", "value ± standard error")
    _row(table, "perplexity", _with_error(result["perplexity"], result["perplexity_se"], 3))
    if result["kl"] is not None:
        _row(table, "KL to the reference (nats)", _with_error(result["kl"], result["kl_se"], 5))
        _row(table, "top-1 agreement", _with_error(result["top1"], result["top1_se"], 4))
    _row(table, "windows", f"{result['windows']} of {result['length']} tokens")
    console.print(table)


def demo(console: Console, result: dict, arguments: dict) -> None:
    table = _table(
        "<model",
        "bits per\npacked weight",
        "MB",
        "quantize (s)",
        "perplexity",
        "KL",
        "top-1",
        "tokens/s",
        title=result["model"],
    )
    for row in result["rows"]:
        _row(
            table,
            row["name"],
            f"{row['bits_per_packed_weight']:.2f}",
            megabytes(row["bytes"]),
            "" if row["seconds_to_quantize"] is None else f"{row['seconds_to_quantize']:.1f}",
            _with_error(row["perplexity"], row["perplexity_se"], 2),
            _with_error(row["kl"], row["kl_se"], 4),
            _with_error(row["top1"], row["top1_se"], 3),
            f"{row['tokens_per_second']:.1f}",
        )
    console.print(table)
    samples = _table("<model", "<sample", title=result["protocol"]["prompt"])
    for row in result["rows"]:
        _row(samples, row["name"], row["sample"])
    console.print(samples)
    for line in (*result["protocol"]["notes"], f"Written: {result['results']}, {result['plot']}"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def tradeoff(console: Console, result: dict, arguments: dict) -> None:
    table = _table(
        *("<setting", "<method", "bits in\nmemory", "bits\nstored", "MB of\nfiles", "KL", "top-1", "perplexity"),
        title=result["model"],
    )
    for row in sorted(result["rows"], key=lambda row: row["file_bytes"]):
        _row(
            table,
            row["name"],
            row["method"],
            f"{row['bits_in_memory']:.2f}",
            f"{row['bits_stored']:.2f}",
            megabytes(row["file_bytes"]) + ("*" if row["on_frontier"] else " "),
            _with_error(row["kl"], row["kl_se"], 4),
            _with_error(row["top1"], row["top1_se"], 3),
            _with_error(row["perplexity"], row["perplexity_se"], 2),
        )
    console.print(table)
    unpacked = result["float"]
    console.print(
        f"* nothing else here has smaller files and a lower KL. The float model: {megabytes(unpacked['memory_bytes'])} "
        f"MB, perplexity {unpacked['perplexity']:.2f}. Written: {result['results']}, {result['plot']}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def doctor(console: Console, result: dict, arguments: dict) -> None:
    about = _table("<what", "<found")
    for name, version in result["versions"].items():
        _row(about, name, version or "not installed")
    for device in result["devices"]:
        _row(about, f"device {device['type']}", ", ".join(f"{k}: {v}" for k, v in device.items() if k != "type"))
    for name, value in result["environment"].items():
        _row(about, name, value)
    _row(about, "torch.backends entry point", "installed" if result["autoload"]["entry_point"] else "missing")
    _row(about, "packed repos load by themselves", "yes" if result["autoload"]["active"] else "no")
    _row(about, "optimum-cli lowbit", "yes" if result["optimum_cli"] else "no")
    console.print(about)

    ops = list(dict.fromkeys(k["op"] for k in result["kernels"]))
    failures: dict[str, list[str]] = {}
    chosen = _table("<device", "<dtype", "<format", *(f"<{op}" for op in ops), title="chosen backend, as run just now")
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for k in result["kernels"]:
        rows.setdefault((k["device"], k["dtype"], k["format"]), {})[k["op"]] = "FAILS" if k["error"] else k["chosen"]
        if k["error"]:
            failures.setdefault(k["error"], []).append(f"{k['op']} of {k['format']} on {k['device']} in {k['dtype']}")
    alike: dict[tuple, list[str]] = {}
    for (device, dtype, format), found in rows.items():
        alike.setdefault((device, format, *(found[op] for op in ops)), []).append(dtype)
    for (device, format, *cells), dtypes in alike.items():
        _row(chosen, device, ", ".join(dtypes), format, *cells)
    console.print(chosen)
    for error, failed in failures.items():
        console.print(f"FAILS: {', '.join(failed)}: {error}", soft_wrap=True, highlight=False, markup=False)

    passed_over = _table("<backend", "<passed over because it", "<for")
    reasons: dict[tuple, dict] = {}
    for k in result["kernels"]:
        for backend, reason in k["passed_over"].items():
            reasons.setdefault(
                (backend, re.sub(r"'(linear(_int8)?|input_gradient|dequantize|embedding)'", "it", reason)), {}
            )[f"{k['device']} {k['op']}"] = None
    for (backend, reason), problems in reasons.items():
        _row(passed_over, backend, reason, ", ".join(problems))
    if reasons:
        console.print(passed_over)
    forms = _table(
        "<device", "<dtype", "<format", "<form", "<not", title="form of the Triton kernels' linear, for few rows"
    )
    together: dict[tuple, list[str]] = {}
    for f in result["forms"]:
        why = "; ".join(f"{form} {reason}" for form, reason in f["passed_over"].items())
        together.setdefault((f"{f['device']} ({f['is']})", f["dtype"], f["chosen"] or "NONE", why), []).append(
            f["format"]
        )
    for (device, dtype, form, why), formats in together.items():
        _row(forms, device, dtype, ", ".join(formats), form, why)
    if together:
        console.print(forms)
    for line in result["advice"]:
        console.print(f"- {line}", soft_wrap=True, highlight=False, markup=False)


def push(console: Console, result: dict, arguments: dict) -> None:
    console.print(result["url"], soft_wrap=True, highlight=False, markup=False)
