"""The command line: one function a verb.

Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 finished with rejected records. Nothing heavy is imported
before a verb needs it. Whatever goes wrong ends in one line on standard error that never holds note text: the message
of an exception from a library may quote its input, so only its type and place are shown.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from clinical_nlp.errors import ClinicalNlpError, UsageError, nearest
from clinical_nlp.progress import is_main_process

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from clinical_nlp.config import Config
    from clinical_nlp.recipe import Recipe
    from clinical_nlp.runs import Run

REJECTED = 3
INTERRUPTED = 130
TERMINATED = 143
_SHOWN_METRICS = 40
_FULL_DISK = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    output = _named_output(words)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        verbose = _take(words, "--verbose")
        _prepare(verbose=verbose, online=_take(words, "--allow-download"))
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except ClinicalNlpError as error:
        return _fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted" + (f"; what is finished lies in {output}" if output else ""), INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); point stdout elsewhere so that closing it says nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError as error:
        return _fail(f"out of memory{_at(error.__traceback__)}; use smaller batches or fewer workers", 1)
    except Exception as error:
        return _fail(_describe(error, output), 1)


def _named_output(words: Sequence[str]) -> Path | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--output="):
            return Path(word.partition("=")[2])
        if word == "--output" and following:
            return Path(following)
    return None


def _take(words: list[str], flag: str) -> bool:
    """Remove a flag that every verb knows, wherever it stands, and return whether it was there."""
    found = flag in words
    while flag in words:
        words.remove(flag)
    return found


def _prepare(*, verbose: bool, online: bool) -> None:
    """Keep the process offline and the libraries quiet; neither a log nor a core file may hold a note."""
    import logging
    import signal
    import threading
    import warnings

    if online:
        os.environ["HF_HUB_OFFLINE"] = "0"
    for variable in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(variable, "0" if online else "1")
    for variable in (
        "HF_HUB_DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
        "HF_HUB_DISABLE_PROGRESS_BARS",
    ):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")

    def record_without_text(*values: Any, **named: Any) -> logging.LogRecord:
        record = make(*values, **named)
        record.msg, record.args, record.exc_info = f"at {record.pathname}:{record.lineno} (message withheld)", (), None
        return record

    make = logging.getLogRecordFactory()
    logging.setLogRecordFactory(record_without_text)
    if not verbose:
        logging.disable(logging.CRITICAL)

    def show_warning(message: object, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if verbose:
            print(f"{category.__name__} at {filename}:{lineno} (message withheld)", file=sys.stderr)

    warnings.showwarning = show_warning  # type: ignore[assignment]
    threading.excepthook = lambda failed: print(
        f"clinical-nlp: a thread failed: {failed.exc_type.__name__}{_at(failed.exc_traceback)}", file=sys.stderr
    )
    sys.unraisablehook = lambda failed: None

    if threading.current_thread() is threading.main_thread():
        parent = os.getpid()

        def stop(number: int, frame: FrameType | None) -> None:
            # Leave through the `finally` blocks, which remove temporary files; a forked worker just ends.
            if os.getpid() != parent:
                os._exit(TERMINATED)
            raise SystemExit(_fail("terminated", TERMINATED))

        signal.signal(signal.SIGTERM, stop)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except (ImportError, ValueError, OSError):  # not on Windows, or not allowed
        pass


def _fail(message: str, code: int) -> int:
    print(f"clinical-nlp: {'error: ' if code < INTERRUPTED else ''}{message}", file=sys.stderr, flush=True)
    return code


def _describe(error: Exception, output: Path | None) -> str:
    """Return one line about an unexpected exception: what kind and where, never its message."""
    if isinstance(error, OSError) and error.errno is not None:
        named = f" {error.filename}" if isinstance(error.filename, str) else ""
        remedy = "; free some space, then add --resume" if error.errno in (28, 122) else ""
        return f"{os.strerror(error.errno).lower()}:{named or _at(error.__traceback__)}{remedy}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory{_at(error.__traceback__)}; use a smaller batch_size, or the strategy qlora"
    if output is not None and output.is_dir() and shutil.disk_usage(output).free < _FULL_DISK:
        # torch and safetensors report a full disk as errors of their own.
        return f"no space left on device: {output}; free some space, then add --resume"
    where = _write_frames(error, output)
    told = f"; its frames are in {where}" if where else ""
    return f"{type(error).__name__}{_at(error.__traceback__)} (its message may quote a note and is withheld{told})"


def _frames(traceback: TracebackType | None) -> list[str]:
    import traceback as reading

    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reading.extract_tb(traceback)]


def _at(traceback: TracebackType | None) -> str:
    """Return the innermost place in this package or in a recipe of the user's (without one, anywhere)."""
    frames = _frames(traceback)
    inside = f"{os.sep}clinical_nlp{os.sep}"
    libraries = (sys.prefix, sys.base_prefix)
    own = [frame for frame in frames if inside in frame or not frame.startswith(libraries)]
    place = (own or frames or [""])[-1].partition(" in ")[0]
    return f" at {place.rpartition(inside)[2]}" if place else ""


def _write_frames(error: BaseException, output: Path | None) -> Path | None:
    """Write the frames (files and lines, no messages) beside or into the output, for a bug report."""
    if output is None:
        return None
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(lines) < 1000:
        lines += [type(cause).__name__, *(f"  {frame}" for frame in _frames(cause.__traceback__))]
        cause = cause.__cause__ or cause.__context__
    path = output / "error.txt" if output.is_dir() else output.with_name(f"{output.name}.error.txt")
    try:
        path.write_text("\n".join(lines) + "\n", "utf-8")
    except OSError:
        return None
    return path


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def __init__(self, prog: str, description: str | None = None, **options: Any) -> None:
        # An abbreviation that works today means something else once a key is added.
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


_EPILOG = """\
Everywhere: --allow-download lets a hub id be fetched (default: never, HF_HUB_OFFLINE=1); --verbose says where
libraries warn (their messages may quote notes and are withheld).
Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 finished with rejected records."""


def _dispatch(words: list[str]) -> int:
    from clinical_nlp import __version__

    parser = _Parser(
        prog="clinical-nlp",
        description="Adapt language models to a hospital's own notes, extract phenotypes, evaluate across hospitals.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clinical-nlp {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", dest="verb")
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=(verb.__doc__ or "").partition("\n")[0], add_help=False)
    if not words:
        parser.print_help()
        return UsageError.exit_code
    if not words[0].startswith("-"):
        if words[0] not in VERBS:
            raise UsageError(f"command {words[0]!r} is not known{nearest(words[0], VERBS)}")
        return _exits(VERBS[words[0]], words[1:])
    return _exits(lambda rest: int(parser.parse_args(rest) is None), words)


def _exits(verb: Callable[[list[str]], int], words: list[str]) -> int:
    """Call a verb; argparse leaves --help and --version through SystemExit."""
    try:
        return verb(words)
    except SystemExit as leaving:
        if isinstance(leaving.code, int) or leaving.code is None:
            return leaving.code or 0
        raise


def _add_config(parser: _Parser, config_class: type[Config], *, positional: str = "") -> None:
    """Add one option for every field of a config class, but for the one that is given without a name."""
    from clinical_nlp.config import NamedConfig, fields

    group = parser.add_argument_group("config keys, as in the YAML (--KEY VALUE or --KEY=VALUE)")
    for key, kind, default, text in fields(config_class):
        if key == positional:
            continue
        text = text.replace("%", "%%")
        if kind.startswith("dict"):
            group.add_argument(f"--{key}.NAME", metavar="VALUE", help=text)
            continue
        # A flag may stand alone: --propagate is --propagate=true.
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if kind.startswith("bool") else {}
        group.add_argument(
            f"--{key}",
            dest=f"config {key}",
            default=argparse.SUPPRESS,
            metavar=kind.replace(" or none", ""),
            help=f"{text} ({'none allowed, ' if ' or none' in kind else ''}{_shown_default(default)})",
            **flag,
        )
    for key, info in config_class.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, NamedConfig):
            same = f"same as --{key}.name"
            group.add_argument(f"--{key}", dest=f"config {key}", default=argparse.SUPPRESS, metavar="NAME", help=same)


def _shown_default(default: Any) -> str:
    if default == "(required)":
        return "required"
    if isinstance(default, (list, tuple)):
        default = ",".join(map(str, default)) or "empty"
    if isinstance(default, bool) or default is None:
        default = str(default).lower()
    if isinstance(default, str) and not default.isprintable():
        default = repr(default)
    return f"default {default}".replace("%", "%%")


def _parse(
    parser: _Parser, config_class: type[Config], words: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse a verb's words into its own arguments and the overrides of its config.

    An unknown key is refused here, before argparse could take its value for a positional argument.
    """
    from clinical_nlp.config import fields, nearest_key, parse_overrides
    from clinical_nlp.errors import ConfigError

    known = parser._option_string_actions
    open_ended = tuple(f"--{key}." for key, kind, *_ in fields(config_class) if kind.startswith("dict"))
    rest: list[str] = []
    extra: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        option, separator, _ = word.partition("=")
        if (plain := option.replace("-", "_").replace("__", "--", 1)) in known and option not in known:
            option, word = plain, word.replace(option, plain, 1)
        if option.startswith(open_ended) and open_ended:
            if not separator:
                if not waiting:
                    raise ConfigError(f"option {option} needs a value")
                word = f"{word}={waiting.pop(0)}"
            extra.append(word)
        elif not word.startswith("--") or word == "--" or option in known:
            rest.append(word)
        else:
            own = [name[2:] for name in known if name.startswith("--")]
            close = nearest(option[2:], own)
            if "did you mean" not in close:
                close = nearest_key(config_class, option[2:].replace("-", "_"))
            raise ConfigError(f"config key {option[2:]!r} is not known{close}")
    arguments = parser.parse_args(rest)
    chosen = {key.removeprefix("config "): value for key, value in vars(arguments).items() if key.startswith("config ")}
    # Sections before their keys (`--strategy lora` before `--strategy.rank 8`), in whichever order they were typed.
    flags = [f"--{key}={chosen[key]}" for key in sorted(chosen, key=lambda key: key.count("."))]
    return arguments, parse_overrides([*flags, *extra])


def demo(words: list[str]) -> int:
    """Run the whole path on built-in data and the built-in model, and show what it measures."""
    parser = _Parser(prog="clinical-nlp demo", description=demo.__doc__)
    parser.add_argument("--output", type=Path, help="new folder for the results (default demo-output, or -2, -3, ...)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic notes and the training (default 0)")
    arguments = parser.parse_args(words)
    output = arguments.output or _fresh(Path("demo-output"))
    from clinical_nlp.demo import run_demo

    run_demo(output, arguments.seed)
    return 0


def _fresh(folder: Path) -> Path:
    number = 1
    candidate = folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def doctor(words: list[str]) -> int:
    """Say what this machine can do: GPU, 4-bit, offline mode, versions."""
    _Parser(prog="clinical-nlp doctor", description=doctor.__doc__).parse_args(words)
    from clinical_nlp.doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.state:<8} {finding.what:<{width}}  {finding.detail}")
    broken = [finding.what for finding in findings if finding.state == "broken"]
    print(f"{len(findings)} checks, {len(broken)} broken" + (f": {', '.join(broken)}" if broken else ""))
    return 1 if broken else 0


def list_names(words: list[str]) -> int:
    """List recipes, corpora, suites, strategies or objectives."""
    tables = {
        "recipes": lambda: _recipes("recipes"),
        "corpora": _corpora,
        "suites": lambda: _recipes("eval"),
        "strategies": lambda: _table("clinical_nlp.adaptation", "STRATEGIES"),
        "objectives": lambda: _table("clinical_nlp.invariance", "OBJECTIVES"),
    }
    parser = _Parser(prog="clinical-nlp list", description=list_names.__doc__)
    parser.add_argument("what", choices=list(tables))
    rows = tables[parser.parse_args(words).what]()
    width = max((len(name) for name in rows), default=0)
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    if not rows:
        print("none yet")
    return 0


def _recipes(shelf: Any) -> dict[str, str]:
    from clinical_nlp.recipe import list_recipes

    return {
        recipe.name: recipe.summary + ("" if recipe.packaged else f" [{recipe.path}]") for recipe in list_recipes(shelf)
    }


def _corpora() -> dict[str, str]:
    from clinical_nlp.notes.corpus import CORPORA, corpus_module

    cards = {name: corpus_module(name).CARD for name in CORPORA}
    return {
        name: f"{card.size}; licence: {card.licence}; institution = {card.institution_means}; {card.obtain}"
        for name, card in cards.items()
    }


def _table(module: str, name: str) -> dict[str, str]:
    import importlib

    return dict(getattr(importlib.import_module(module), name))


def copy(words: list[str]) -> int:
    """Copy a recipe and its config, to edit."""
    parser = _Parser(prog="clinical-nlp copy", description=copy.__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="see clinical-nlp list recipes")
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder, or a new file name ending in .py")
    arguments = parser.parse_args(words)
    from clinical_nlp.recipe import copy_recipe

    new = copy_recipe(arguments.recipe, arguments.dest)
    print(f"copied {len(new)} files: {', '.join(map(str, new))}")
    print(f"run it with: clinical-nlp run {os.path.join('.', new[0])} --output DIR")
    return 0


def run(words: list[str]) -> int:
    """Run a recipe: adapt a model, chain the steps, and evaluate on held-out patients."""
    return _run_from_shelf(words, "run", "recipes", "RECIPE")


def evaluate(words: list[str]) -> int:
    """Run an evaluation suite."""
    return _run_from_shelf(words, "evaluate", "eval", "SUITE")


def _run_from_shelf(words: list[str], verb: str, shelf: Any, what: str) -> int:
    from clinical_nlp.recipe import find_recipe

    if not words or words[0].startswith("-"):
        if "--help" in words or "-h" in words:
            print(f"usage: clinical-nlp {verb} {what} [--config FILE] [--KEY VALUE ...] --output DIR [--resume]\n")
            for name, text in _recipes(shelf).items():
                print(f"  {name:<12}  {text}")
            print(f"\nclinical-nlp {verb} {what} --help lists every config key.")
            return 0
        raise UsageError(f"name the {what} right after {verb!r}; clinical-nlp {verb} --help lists them")
    recipe = find_recipe(words[0], shelf)
    module = recipe.load()
    parser = _Parser(prog=f"clinical-nlp {verb} {words[0]}", description=module.__doc__)
    _add_common(parser)
    _add_config(parser, module.CONFIG)
    arguments, overrides = _parse(parser, module.CONFIG, words[1:])
    return _execute(recipe, arguments, overrides)


def _add_common(parser: _Parser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (default: the one beside the recipe)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the result, new or empty")
    parser.add_argument("--resume", action="store_true", help="finish what was interrupted in --output")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")


def _execute(recipe: Recipe, arguments: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from clinical_nlp.recipe import execute

    config = recipe.config(arguments.config, overrides)
    if arguments.print_config:
        return _print_config(config)
    if arguments.output is None:
        raise UsageError("--output DIR is needed")
    return _finished(execute(recipe, config, output=arguments.output, resume=arguments.resume), recipe.name)


def _finished(result: Run, name: str) -> int:
    """Say what a run did in numbers and where the result is."""
    if not is_main_process():
        return 0
    _show_metrics(result)
    rejected = _rejected(result.manifest)
    seconds = result.manifest.get("duration_seconds")
    print(f"{name}: {len(result.metrics)} figures" + (f" in {seconds:.0f} s" if seconds is not None else ""))
    if rejected:
        print(f"{rejected} records were rejected; the reasons are in {result.path}")
    report = result.path / "report.html"
    print(f"result: {report if report.is_file() else result.path}")
    return REJECTED if rejected else 0


def _print_config(config: Config) -> int:
    from clinical_nlp.config import to_yaml

    print(to_yaml(config), end="")
    return 0


def _show_metrics(run: Run) -> None:
    """Print the figures with their intervals; where there are too many, the aggregate ones."""
    rows = []
    for name, found in run.metrics.items():
        if not isinstance(found, dict) or "value" not in found:
            continue
        numbers = [found.get(key) for key in ("value", "low", "high")]
        value, low, high = ("-" if number is None else f"{number:.4g}" for number in numbers)
        where = f"{found.get('n_patients')} patients, {found.get('n_notes')} notes"
        rows.append((name, value, "no interval" if "-" in (low, high) else f"{low} to {high}", where))
    if len(rows) > _SHOWN_METRICS:
        rows.sort(key=lambda row: row[0].count("."))
    for name, value, interval, where in rows[:_SHOWN_METRICS]:
        width = max(len(row[0]) for row in rows[:_SHOWN_METRICS])
        print(f"{name:<{width}}  {value:>8}  {interval:<18}  {where}")
    if len(rows) > _SHOWN_METRICS:
        print(f"... and {len(rows) - _SHOWN_METRICS} more in {run.path / 'metrics.json'}")


def _rejected(manifest: Mapping[str, Any]) -> int:
    """Return how many input records a run rejected, wherever in its manifest the recipe counted them."""
    count = 0
    for key, value in manifest.items():
        if key in ("rejected", "n_rejected") and isinstance(value, int):
            count += value
        elif isinstance(value, dict) and key != "config":
            count += _rejected(value)
    return count


def extract(words: list[str]) -> int:
    """Extract phenotypes from every note of an export, and gather them by patient."""
    from clinical_nlp.config import load_config
    from clinical_nlp.extraction import extract_with
    from clinical_nlp.extraction.plan import ExtractionConfig

    parser = _Parser(prog="clinical-nlp extract", description=extract.__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", help="file or folder of the export, or a table (--format catalog)"
    )
    _add_common(parser)
    parser.add_argument(
        "--update", action="store_true", help="bring a finished --output to the state of the export; see what changed"
    )
    parser.add_argument(
        "--retry-rejected", action="store_true", help="annotate again what was rejected in extraction (not in reading)"
    )
    parser.add_argument(
        "--evidence", nargs="+", metavar="PATIENT", default=[], help="also write a page of evidence of these patients"
    )
    _add_config(parser, ExtractionConfig, positional="source")
    arguments, overrides = _parse(parser, ExtractionConfig, words)
    if arguments.source is not None:
        overrides["source"] = arguments.source
    config = load_config(ExtractionConfig, arguments.config, overrides)
    if arguments.print_config:
        return _print_config(config)
    if arguments.output is None:
        raise UsageError("--output DIR is needed")
    result = extract_with(
        config,
        arguments.output,
        resume=arguments.resume,
        update=arguments.update,
        retry_rejected=arguments.retry_rejected,
    )
    print(result)
    if arguments.evidence:
        from clinical_nlp.reporting.evidence_page import write_evidence

        for path in write_evidence(arguments.output, arguments.evidence):
            print(f"evidence: {path}")
    return REJECTED if result.rejected else 0


def review(words: list[str]) -> int:
    """Draw notes for readers from an extraction, and measure it with their corrections."""
    parser = _Parser(prog="clinical-nlp review", description=review.__doc__)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory of a finished extraction")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", type=Path, metavar="DIR", help="new folder for BRAT and Label Studio; holds notes")
    what.add_argument("--import", type=Path, metavar="DIR", dest="back", help="that folder, with the corrections")
    drawing = parser.add_argument_group("with --export")
    drawing.add_argument("--concepts", metavar="ID,ID", default="", help="what is reviewed (default: the commonest)")
    drawing.add_argument("--n-concepts", type=int, metavar="N", default=20, help="how many of the commonest (20)")
    drawing.add_argument("--patients", type=int, metavar="N", default=120, help="how many patients at least (120)")
    drawing.add_argument(
        "--notes-per-patient", type=int, metavar="N", default=2, help="flagged notes, and unflagged ones, at most (2)"
    )
    drawing.add_argument(
        "--readers", metavar="NAME,NAME", default="reader-1,reader-2", help="who reads (reader-1,reader-2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw, or of the resampling (default 0)")
    judging = parser.add_argument_group("with --import")
    judging.add_argument("--truth", metavar="READER", help="whose word counts (default: the mean of all readers)")
    arguments = parser.parse_args(words)
    from clinical_nlp.extraction.review import export_review, import_review

    if arguments.back is not None:
        result = import_review(arguments.output, arguments.back, truth=arguments.truth, seed=arguments.seed)
        print(result)
        return REJECTED if result.rejected else 0
    if arguments.truth is not None:
        raise UsageError("--truth goes with --import (see clinical-nlp review --help)")
    print(
        export_review(
            arguments.output,
            arguments.export,
            concepts=[name for name in arguments.concepts.split(",") if name],
            n_concepts=arguments.n_concepts,
            n_patients=arguments.patients,
            notes_per_patient=arguments.notes_per_patient,
            readers=[name for name in arguments.readers.split(",") if name],
            seed=arguments.seed,
        )
    )
    return 0


def drift(words: list[str]) -> int:
    """Compare institutions, or exports, patient by patient: how far do their notes differ?"""
    from clinical_nlp.recipe import find_recipe

    recipe = find_recipe("drift")
    config_class = recipe.load().CONFIG
    parser = _Parser(prog="clinical-nlp drift", description=drift.__doc__)
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="file or folder of an export; one or more")
    _add_common(parser)
    _add_config(parser, config_class, positional="sources")
    arguments, overrides = _parse(parser, config_class, words)
    if arguments.sources:
        overrides["sources"] = arguments.sources
    return _execute(recipe, arguments, overrides)


def profile(words: list[str]) -> int:
    """Write a text-free summary of an export, which drift compares beside exports or instead of them."""
    import importlib

    from clinical_nlp.config import load_config

    module = importlib.import_module("clinical_nlp.recipes.profile")
    config_class = module.ExportConfig
    parser = _Parser(prog="clinical-nlp profile", description=profile.__doc__)
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help="file or folder of an export; one or more")
    parser.add_argument("--output", type=Path, metavar="FILE", help="new .json file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    _add_config(parser, config_class, positional="sources")
    arguments, overrides = _parse(parser, config_class, words)
    if arguments.sources:
        overrides["sources"] = arguments.sources
    config = load_config(config_class, None, overrides)
    if arguments.print_config:
        return _print_config(config)
    if arguments.output is None:
        raise UsageError("--output FILE is needed")
    found, rejected = module.write_profile(config, arguments.output)
    print(f"profile: {len(found)} institutions; no text, no token, no id (the file says what leaves)")
    print(f"result: {arguments.output}")
    return REJECTED if rejected else 0


def report(words: list[str]) -> int:
    """Render the HTML page of a run again."""
    parser = _Parser(prog="clinical-nlp report", description=report.__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory of a finished run")
    arguments = parser.parse_args(words)
    from clinical_nlp.reporting.page import run_report
    from clinical_nlp.runs import Run

    run = Run.load(arguments.directory)
    run_report(run)
    print(f"result: {run.path / 'report.html'}")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "doctor": doctor,
    "list": list_names,
    "copy": copy,
    "run": run,
    "extract": extract,
    "review": review,
    "drift": drift,
    "profile": profile,
    "evaluate": evaluate,
    "report": report,
}
"""Verb -> function of the words after it. The first line of the docstring is its help."""
