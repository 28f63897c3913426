"""Scripts that teach shells the commands, their options, and the choices of those."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping

from orchestrator_client.command_table import COMMANDS, OPERATOR_COMMANDS

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script for a shell."""
    make = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return make[shell](parsers)


def _names() -> dict[str, str]:
    return {
        **{name: command.summary for name, command in COMMANDS.items()},
        **OPERATOR_COMMANDS,
    }


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            yield action


def _bash(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    lines = [
        "# bash completion of orchestrator: source <(orchestrator completion bash)",
        "_orchestrator() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local command="${COMP_WORDS[1]}" options="" choices=""',
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        COMPREPLY=($(compgen -W {shlex.quote(" ".join(_names()))} -- "$word"))',
        "        return",
        "    fi",
        '    case "$command" in',
    ]
    for name, parser in parsers.items():
        words = [text for action in _options(parser) for text in action.option_strings]
        lines += [f"        {name})", f"            options={shlex.quote(' '.join(words))}"]
        cases = [
            f"                {'|'.join(action.option_strings)})"
            f" choices={shlex.quote(' '.join(map(str, action.choices)))} ;;"
            for action in _options(parser)
            if action.choices
        ]
        if cases:
            lines += ['            case "$before" in', *cases, "            esac"]
        lines += ["            ;;"]
    lines += [
        "    esac",
        '    if [ -n "$choices" ]; then',
        '        COMPREPLY=($(compgen -W "$choices" -- "$word"))',
        '    elif [[ "$word" == -* ]]; then',
        '        COMPREPLY=($(compgen -W "$options" -- "$word"))',
        "    else",
        '        COMPREPLY=($(compgen -f -- "$word"))',
        "    fi",
        "}",
        "complete -o filenames -F _orchestrator orchestrator",
    ]
    return "\n".join(lines)


def _zsh(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    lines = [
        "#compdef orchestrator",
        "# zsh completion of orchestrator: put it into a directory of $fpath as _orchestrator",
        "_orchestrator() {",
        "    local -a commands",
        "    commands=(",
        *(f"        {shlex.quote(f'{name}:{summary}')}" for name, summary in _names().items()),
        "    )",
        "    if (( CURRENT == 2 )); then",
        "        _describe command commands",
        "        return",
        "    fi",
        '    case "$words[2]" in',
    ]
    for name, parser in parsers.items():
        lines += [f"        {name})", "            shift words; (( CURRENT-- ))"]
        lines += ["            _arguments -s \\"]
        for action in _options(parser):
            lines += [f"                {shlex.quote(spec)} \\" for spec in _zsh_specs(action)]
        lines += ["                '*:file:_files'", "            ;;"]
    lines += ["    esac", "}", '_orchestrator "$@"']
    return "\n".join(lines)


def _zsh_specs(action: argparse.Action) -> Iterator[str]:
    text = (action.help or "").replace("[", "(").replace("]", ")").replace(":", " ")
    value = ""
    if action.nargs != 0:
        choices = f"({' '.join(map(str, action.choices))})" if action.choices else "_files"
        value = f":value:{choices}"
    for option in action.option_strings:
        yield f"*{option}[{text}]{value}"


def _fish(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    lines = ["# fish completion of orchestrator"]
    for name, summary in _names().items():
        lines.append(
            "complete -c orchestrator -n __fish_use_subcommand -f"
            f" -a {name} -d {shlex.quote(summary)}"
        )
    for name, parser in parsers.items():
        for action in _options(parser):
            words = [f"complete -c orchestrator -n '__fish_seen_subcommand_from {name}'"]
            for option in action.option_strings:
                words.append(f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}")
            if action.nargs != 0:
                words.append("-r")
            if action.choices:
                words.append(f"-f -a {shlex.quote(' '.join(map(str, action.choices)))}")
            if action.help:
                words.append(f"-d {shlex.quote(action.help)}")
            lines.append(" ".join(words))
    return "\n".join(lines)
