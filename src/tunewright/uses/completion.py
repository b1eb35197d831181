"""Scripts that let a shell complete verbs, options and file names; made from the parser, so that they never lag.

Knows argparse and three shells.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Verb:
    name: str
    help: str
    options: dict[str, str]  # --name -> help
    choices: tuple[str, ...]  # words a place may hold


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of SHELLS; how to install it stands in its first line."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parser.prog, _verbs(parser))


def _verbs(parser: argparse.ArgumentParser) -> list[Verb]:
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    verbs = []
    for name, sub in commands.choices.items():
        options = {o: a.help or "" for a in sub._actions for o in a.option_strings if o.startswith("--")}
        choices = tuple(str(c) for a in sub._actions if not a.option_strings for c in a.choices or ())
        verbs.append(Verb(name, helps.get(name, ""), options, choices))
    return verbs


def _bash(prog: str, verbs: list[Verb]) -> str:
    cases = "\n".join(f'    {v.name}) words="{" ".join([*v.options, *v.choices])}" ;;' for v in verbs)
    return f"""# {prog} completion bash >> ~/.bashrc
_{prog}() {{
  local words="" current="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{" ".join(v.name for v in verbs)} --help --version"
  else case "${{COMP_WORDS[1]}}" in
{cases}
  esac; fi
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -o bashdefault -F _{prog} {prog}
"""  # "default": where no word fits, bash completes file names itself, blanks and all


def _zsh(prog: str, verbs: list[Verb]) -> str:
    names = "\n".join(f"    {_quoted(f'{v.name}:{v.help}')}" for v in verbs)
    cases = "\n".join(_zsh_case(v) for v in verbs)
    return f"""#compdef {prog}
# {prog} completion zsh > "${{fpath[1]}}/_{prog}"
_{prog}() {{
  local -a verbs options choices
  verbs=(
{names}
  )
  if (( CURRENT == 2 )); then _describe verb verbs; return; fi
  case $words[2] in
{cases}
  esac
  if [[ $PREFIX == -* ]]; then _describe option options
  elif (( $#choices )); then _describe word choices
  else _files; fi
}}
if [ "$funcstack[1]" = "_{prog}" ]; then _{prog} "$@"; else compdef _{prog} {prog}; fi
"""


def _zsh_case(verb: Verb) -> str:
    options = " ".join(_quoted(f"{name}:{help}") for name, help in verb.options.items())
    return f"    {verb.name}) options=({options}); choices=({' '.join(verb.choices)}) ;;"


def _fish(prog: str, verbs: list[Verb]) -> str:
    lines = [f"# {prog} completion fish > ~/.config/fish/completions/{prog}.fish"]
    for verb in verbs:
        lines.append(f"complete -c {prog} -f -n __fish_use_subcommand -a {verb.name} -d {_quoted(verb.help)}")
        seen = f"-n '__fish_seen_subcommand_from {verb.name}'"
        lines += [f"complete -c {prog} {seen} -l {o[2:]} -d {_quoted(help)}" for o, help in verb.options.items()]
        lines += [f"complete -c {prog} {seen} -f -a '{' '.join(verb.choices)}'"] if verb.choices else []
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """In single quotes; what stands inside is made harmless: an apostrophe ends such a quote in every shell."""
    return "'" + text.replace("'", "’").replace("\n", " ") + "'"
