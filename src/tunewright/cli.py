"""The door: `tunewright VERB ...`. Words in, exit code out; every verb calls one function of the rooms below.

People's text goes to stderr, results to stdout; `--json` prints exactly one JSON document there. Nothing heavy is
imported until a verb needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import tunewright
from tunewright import find
from tunewright.engine.interruption import Interrupted
from tunewright.errors import Fault, RecipeError, TunewrightError, UserError, nearest
from tunewright.importing import bring, own_process

RECIPE_HELP = "a recipe (YAML), or none and the keys below"
WAYS = ("linear", "add", "ties", "dare", "soup")
KEYS_HELP = "section.key=value: sets or overrides a key, such as train.learning_rate=1e-4 or method=head"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 2 the input is wrong, 1 our fault, 130 interrupted."""
    if arguments is None:
        own_process()
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    try:
        options = _parse(words)
        as_json = options.json
        return options.run(options)
    except TunewrightError as error:
        return _fail(error, as_json)
    except Interrupted as stop:
        _print_error("Interrupted", str(stop), as_json)
        return int(stop.code or 0)
    except SystemExit as done:  # --help and --version have printed what they were asked for
        return int(done.code or 0)
    except KeyboardInterrupt:
        _say("Interrupted.")
        _print_error("KeyboardInterrupt", "interrupted", as_json)
        return 130
    except BrokenPipeError:  # `tunewright ... | head` has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        _say(f"{traceback.format_exc()}\nThis is a fault of tunewright, not of your input. Please report these lines.")
        _print_error(type(error).__name__, str(error), as_json)
        return 1


def _fail(error: TunewrightError, as_json: bool) -> int:
    if as_json:
        print(_json(error.as_dict()))
    count = len(error.faults)
    _say(f"{type(error).__name__}: {count} faults." if count > 1 else "")
    _say(error.text())
    return error.exit_code


def _print_error(kind: str, problem: str, as_json: bool) -> None:
    if as_json:
        print(_json({"error": kind, "faults": [asdict(Fault(problem))]}))


def _say(text: str) -> None:
    if text:
        print(_printable(text), file=sys.stderr)


def _json(value: Any) -> str:
    """One document. What a terminal would obey, or cannot show, is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _printable(text: str) -> str:
    """Without control characters, which would steer a terminal, and what stdout cannot spell escaped."""
    tame = "".join(c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "?" for c in text)
    coding = getattr(sys.stdout, "encoding", None) or "utf-8"  # None: stdout was closed
    return tame.encode(coding, "backslashreplace").decode(coding)


# --------------------------------------------------------------------- parsing
class _Parser(argparse.ArgumentParser):
    """argparse that raises what is wrong, so that it is said, and printed as JSON, like every other fault."""

    def error(self, message: str) -> NoReturn:
        remedy = f"`{self.prog} --help` shows what there is."
        raise UserError(Fault(message, where="command line", remedy=remedy))


def _parse(words: list[str]) -> argparse.Namespace:
    parser, verbs = _parser()
    if not words:
        parser.print_help()
        parser.exit()
    if words[0].startswith("-"):
        parser.parse_args(words)  # prints and leaves, or raises
    if words[0] not in verbs:
        remedy = nearest(words[0], list(verbs)) or "`tunewright --help` shows what each does."
        problem = f'unknown verb "{words[0]}"'
        raise UserError(Fault(problem, where="command line", expected="one of " + ", ".join(verbs), remedy=remedy))
    verb = verbs[words[0]]
    # intermixed: `check RECIPE.yaml --json seed=1` means what it says
    options, unknown = verb.parse_known_intermixed_args(words[1:])
    known = sorted(set(re.findall(r"(?<![\w-])--?[a-z]+", verb.format_help().partition("options:")[2])))
    if unknown:
        raise UserError([_unknown_option(word, known) for word in unknown])
    return options


def _unknown_option(word: str, known: list[str]) -> Fault:
    expected = "one of " + ", ".join(known)
    return Fault(f'unknown option "{word}"', where="command line", expected=expected, remedy=nearest(word, known))


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The whole command, and the parser of each verb."""
    parser = _Parser(
        prog="tunewright",
        description="Fine-tune any pre-trained model on your own data, and know whether it got better.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tunewright {tunewright.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, run: Any, help: str, recipe: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        if recipe:
            sub.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help=RECIPE_HELP)
            sub.add_argument("keys", nargs="*", metavar="key=value", help=KEYS_HELP)
        sub.set_defaults(run=run)
        return sub

    verb("check", _check, "find every fault of recipe and data before training, and show what will be trained on", True)
    train = verb("train", _train, "train, measure base against tuned, write the report; continues a killed run", True)
    changed = "continue although data, training or evaluation keys have changed, and say which"
    train.add_argument("--allow-change", action="store_true", help=changed)
    train.add_argument("--again", action="store_true", help="train anew in a fresh folder beside a finished run")
    seeds = "train with so many seeds on the same rows, in one folder each, and judge them together (3 or more)"
    train.add_argument("--seeds", type=_several, metavar="N", help=seeds)
    evaluate = verb("evaluate", _evaluate, "show a run's evidence, or score base and tuned on another file")
    evaluate.add_argument("folder", metavar="RUN")
    evaluate.add_argument("file", nargs="?", metavar="FILE", help="rows with labels; none: what the run measured")
    gauges = "measure on the run's own rows what was left out or was added since: messy input, groups, confidence ..."
    evaluate.add_argument("--gauges", action="store_true", help=gauges)
    curve = "would more data help? Trains anew on an eighth, a quarter and half of the rows, in RUN/curve"
    evaluate.add_argument("--learning-curve", action="store_true", help=curve)
    evaluate.add_argument("--base", help="where the base lies now, if it was moved")
    predict = verb("predict", _predict, "ask a run's model: a text, a picture, a folder, or a file of rows")
    predict.add_argument("folder", metavar="RUN")
    predict.add_argument("input", metavar="INPUT", help="a text, a picture, a folder of pictures, a CSV or JSONL file")
    predict.add_argument("-o", "--output", help="where the rows with answers go; default: beside a CSV, .predicted.csv")
    predict.add_argument("--base", help="where the base lies now, if it was moved")
    report = verb(
        "report", _report, "write report.html and the model card of a run again; of several: one page for all"
    )
    report.add_argument("folders", nargs="+", metavar="RUN")
    report.add_argument("--out", metavar="FILE", help="several runs: where the page goes (default: compare.html)")
    compare = verb("compare", _compare, "runs side by side on the same held-out rows")
    compare.add_argument("folders", nargs="+", metavar="RUN")
    merge = verb("merge", _merge, "fold a run into a plain model, or several runs of one base into one; proven equal")
    merge.add_argument("folders", nargs="+", metavar="RUN")
    merge.add_argument(
        "--out", metavar="FOLDER", help="where the merged model goes (default: RUN-merged, RUN-ties ...)"
    )
    merge.add_argument("--how", choices=WAYS, help="how several runs become one (default: linear, the weighted mean)")
    merge.add_argument("--weights", type=_numbers, metavar="X,X", help="one number a run (default: all the same)")
    merge.add_argument("--density", type=float, help="ties, dare: share of the changes that stays (default: .2, .1)")
    merge.add_argument("--scale", type=float, help="add, ties, dare: factor on the changes (default: .4, 1, 1)")
    merge.add_argument("--seed", type=int, default=0, help="dare: which changes stay (default: 0)")
    merge.add_argument("--base-share", type=_share, metavar="X|auto", help="share of the base's weights in the result")
    merge.add_argument("--validation", metavar="FILE", help="rows that soup and --base-share auto choose on")
    merge.add_argument("--tolerance", type=float, help="largest relative difference of a logit (default: the recipe's)")
    merge.add_argument("--base", help="where the base lies now, if it was moved")
    chat = verb("chat", _chat, "talk to a run's model: lines in, answers out, until an empty line")
    chat.add_argument("folder", metavar="RUN")
    chat.add_argument("--side-by-side", "--base-too", action="store_true", help="let the base answer each line as well")
    chat.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help="longest answer (default: 256)")
    chat.add_argument("--base", help="where the base lies now, if it was moved")
    init = verb("init", _init, "look at a data file or folder and write a commented recipe for it")
    init.add_argument("data", metavar="DATA", help="a file, a folder, or a hub id: org/name, org/name#config:split")
    init.add_argument("--model", help="the base: a folder or a hub id (default: a small one that suits)")
    init.add_argument("--task", help="what to learn (default: what the columns suggest)")
    init.add_argument("-o", "--output", default="recipe.yaml", help="the recipe's file (default: recipe.yaml)")
    init.add_argument("--force", action="store_true", help="write over an existing file")
    verb("doctor", _doctor, "versions, device, missing extras, and self-tests of what training rests on")
    shell = verb("completion", _completion, "print a script that completes verbs, options and files in your shell")
    shell.add_argument("shell", choices=("bash", "zsh", "fish"))
    cache = verb("cache", _cache, "what runs share on the disk (activations of frozen models): list it, or clear it")
    cache.add_argument("what", nargs="?", choices=("list", "clear"), default="list", help="default: list")
    demo = verb("demo", _demo, "a few minutes from nothing to a verdict: support tickets, and pictures as a smoke test")
    demo.add_argument("--out", default="runs/demo", help="folder for the runs (default: runs/demo)")
    verb("tasks", lambda o: _list(o, "tasks"), "what can be learned")
    verb("methods", lambda o: _list(o, "methods"), "how a model can be adapted")
    return parser, verbs.choices


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 or more")
    return number


def _several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("2 or more; 3 give a band that says something")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _share(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _read_recipe(options: argparse.Namespace) -> tuple[Any, str | None]:
    """The recipe and its output_dir. Without a file, the keys alone are the recipe."""
    from tunewright.recipe import Recipe

    given = [options.recipe, *options.keys] if options.recipe else []
    if not given:
        raise RecipeError(Fault("no recipe given", where="command line", remedy="tunewright check RECIPE.yaml"))
    try:
        if "=" not in given[0] or Path(given[0]).exists():
            return Recipe.read(given[0], given[1:])
        return Recipe.from_keys(given)
    except RecipeError as error:
        if error.rest is None:
            raise
        from tunewright.runs.checking import with_the_rest

        raise with_the_rest(error) from None


# ----------------------------------------------------------------------- verbs
def _check(options: argparse.Namespace) -> int:
    recipe, _ = _read_recipe(options)
    bring("tunewright.runs.checking")
    from tunewright.runs.checking import check

    found = check(recipe)
    _result(options, found, _check_text(found))
    return 0


def _check_text(found: dict[str, Any]) -> str:
    lines = []
    for file in found["files"]:
        dropped = ", ".join(f"{n} {reason}" for reason, n in file["dropped"].items()) or "none dropped"
        lines.append(
            f"{file['file']} ({file['split']}): {file['rows_read']} rows read, {file['rows_kept']} kept; {dropped}."
        )
    lines.append("Rows: " + ", ".join(f"{n} {name}" for name, n in found["rows"].items()) + ".")
    for split, counts in found.get("labels", {}).items():
        if counts:
            lines.append(f"Labels in {split}: " + ", ".join(f"{name} {n}" for name, n in counts.items()) + ".")
    if "lengths" in found:
        size, cut = found["lengths"], found["truncated"]
        lines.append(
            f"Lengths: {size['min']} to {size['max']} {size['unit']}, median {size['median']}, 95% to {size['p95']}; "
            f"{cut['rows']} of {cut['of']} rows are cut."
        )
    lines += [*found["notes"], *found["settings"]]
    train, total = found["trainable_parameters"], found["total_parameters"]
    share = 100 * train / total
    shown = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
    lines.append(f"{train:,} of {total:,} numbers train ({shown} %).")
    lines.append(f"Row {found['example']['row']}, as the model sees it:\n    {found['example']['shown']}")
    lines.append(found["test_can_show"])
    return "\n".join(lines) + "\nNothing stands in the way of training."


def _train(options: argparse.Namespace) -> int:
    recipe, output_dir = _read_recipe(options)
    bring("tunewright.runs.training")
    from tunewright.runs.training import train

    out = Path(output_dir or f"runs/{recipe.digest()}").expanduser()
    if options.seeds:
        from tunewright.runs.seeds import train_seeds

        found = train_seeds(
            recipe, out, options.seeds, again=options.again, allow_change=options.allow_change, say=_say
        )
        _result(options, found, f"{found['verdict']['sentence']}")
        return 0
    run = train(recipe, out, again=options.again, allow_change=options.allow_change, say=_say)
    evidence = run.read_json("evidence.json")
    short = {
        "run": str(run.path),
        "verdict": evidence["verdict"],
        "measures": evidence["measures"],
        "cost": evidence["cost"],
    }
    _result(options, short | {"report": str(run.path / "report.html")}, str(run.path))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from tunewright.rundir import RunDir

    run = RunDir.open(options.folder)
    if options.gauges:
        from tunewright.runs.evaluation import measure_gauges

        if options.file is not None:
            raise RecipeError(Fault("--gauges looks at the run's own rows", where="command line", got=options.file))
        measured = measure_gauges(run.path, options.base, _say)
        _say(f"Measured: {', '.join(measured) or 'nothing was left'}.")
    if options.learning_curve:
        from tunewright.runs.learning_curve import learning_curve

        if options.file is not None:
            problem = "--learning-curve looks at the run's own rows"
            raise RecipeError(Fault(problem, where="command line", got=options.file))
        found = learning_curve(run.path, options.base, _say)
        _result(options, found, found["sentence"])
        return 0
    if options.file is None:
        if not run.finished:
            from tunewright.errors import RunError

            raise RunError(Fault("not finished, so nothing was measured", where=str(run.path)))
        evidence = run.read_json("evidence.json")
    else:
        from tunewright.runs.evaluation import evaluate_file

        evidence = evaluate_file(run.path, Path(options.file), options.base)
    lines = [evidence["verdict"]["sentence"], f"Before: {evidence['baseline']['text']}."]
    for m in evidence["measures"]:
        low, high = m["ci95"]
        change = f"{m['difference']:+.4f} (95% interval {low:+.4f} to {high:+.4f})"
        lines.append(f"{m['name']:<12} before {m['base']:.4f}  after {m['tuned']:.4f}  {change}")
    _result(options, evidence, "\n".join(lines))
    return 0


def _predict(options: argparse.Namespace) -> int:
    bring("tunewright.runs.answering")
    from tunewright.runs.answering import answer

    answers, written = answer(Path(options.folder), options.input, options.base, options.output, _say)
    if written and not options.json:
        _say(f"{len(answers)} row{'s' if len(answers) > 1 else ''} with answers: {written}")
        return 0
    text = "\n".join(f"{a['row']}\t{a['label']}\t{a['score']:.3f}" if "label" in a else _said(a) for a in answers)
    _result(options, answers, text)
    return 0


def _said(answer: dict[str, Any]) -> str:
    """An answer that is no label: its text alone, or everything."""
    return answer["text"] if "text" in answer else json.dumps(answer, ensure_ascii=False)


def _report(options: argparse.Namespace) -> int:
    from tunewright.rundir import RunDir
    from tunewright.runs.report.card import write_card
    from tunewright.runs.report.page import write_report

    if len(options.folders) > 1:
        return _report_all([Path(folder) for folder in options.folders], options)
    if options.out:
        raise UserError(Fault("--out is for several runs; the page of one stays in its folder", where="command line"))
    run = RunDir.open(options.folders[0])
    page, card = write_report(run.path), write_card(run.path)
    _result(options, {"report": str(page), "card": str(card)}, f"{page}\n{card}")
    return 0


def _report_all(folders: list[Path], options: argparse.Namespace) -> int:
    from tunewright.runs.report.side_by_side import write_side_by_side
    from tunewright.uses.comparison import compare, differing

    page = write_side_by_side(compare(folders), differing(folders), folders, Path(options.out or "compare.html"))
    _result(options, {"report": str(page)}, str(page))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from tunewright.uses.comparison import as_text, compare

    table = compare([Path(folder) for folder in options.folders])
    _result(options, table, as_text(table))
    return 0


def _merge(options: argparse.Namespace) -> int:
    bring("tunewright.uses.merging")
    from tunewright.uses.merging import Way, merge

    way = Way(options.how, options.weights, options.density, options.scale, options.seed, options.base_share)
    found = merge(
        [Path(folder) for folder in options.folders], options.out and Path(options.out), way,
        validation=options.validation and Path(options.validation), tolerance=options.tolerance, base=options.base,
        say=_say,
    )  # fmt: skip
    _result(options, found, f"{found['verdict']['sentence']}\n{found['folder']}")
    return 0


def _chat(options: argparse.Namespace) -> int:
    bring("tunewright.uses.chatting")
    from tunewright.uses.chatting import chat

    def write(text: str) -> None:
        if not options.json:
            print(_printable(text), end="", flush=True)

    exchanges = chat(
        Path(options.folder), _asked(), write=write, say=_say, side_by_side=options.side_by_side,
        max_new_tokens=options.max_new_tokens, base=options.base,
    )  # fmt: skip
    found = []
    try:
        for exchange in exchanges:
            found.append(exchange)
    except KeyboardInterrupt:  # how people leave a conversation
        write("\n")
    if options.json:
        print(_json(found))
    return 0


def _asked() -> Iterator[str]:
    """Lines of stdin; with a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _init(options: argparse.Namespace) -> int:
    from tunewright.uses.starting import start

    found = start(options.data, model=options.model, task=options.task, out=Path(options.output), force=options.force)
    for guess in found["guesses"]:
        _say(f"Guessed: {guess}.")
    for fault in found["faults"]:
        _say(f"Still in the way: {fault}")
    _result(options, found, f"{found['recipe']}\nNext: tunewright check {found['recipe']}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from tunewright.uses.doctor import as_text, doctor

    found = doctor()
    _result(options, found, as_text(found))
    return 0 if found["ok"] else 1


def _completion(options: argparse.Namespace) -> int:
    from tunewright.uses.completion import completion

    script = completion(_parser()[0], options.shell)
    _result(options, {"shell": options.shell, "script": script}, script)
    return 0


def _cache(options: argparse.Namespace) -> int:
    from tunewright.uses.sharing import as_text, clear, listing

    found = clear() if options.what == "clear" else listing()
    _result(options, found, as_text(found))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from tunewright.uses.demo import demo

    found = demo(Path(options.out), say=_say)
    _result(options, found, found["text"])
    return 0


def _list(options: argparse.Namespace, folder: str) -> int:
    entries = [
        {"name": name, "summary": find.summary(folder, name), "advice": find.advice(folder, name)}
        for name in find.names(folder)
    ]
    lines = [f"{e['name']:<24} {e['summary']}" + (f"\n{'':<24} {e['advice']}" if e["advice"] else "") for e in entries]
    _result(options, entries, "\n".join(lines))
    return 0


def _result(options: argparse.Namespace, value: Any, text: str) -> None:
    print(_json(value) if options.json else _printable(text))


if __name__ == "__main__":
    sys.exit(main())
