"""``knowsam completion``: a script that completes commands, options and files in a shell, made from the parsers."""

import argparse
import importlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from knowsam.components import METHODS
from knowsam.pretrained import WEIGHTS

EPILOG = """examples:
  eval "$(knowsam completion bash)"                                                    # this shell, at once
  knowsam completion bash > ~/.local/share/bash-completion/completions/knowsam         # every new bash
  knowsam completion zsh > "${fpath[1]}/_knowsam"                                      # every new zsh
  knowsam completion fish > ~/.config/fish/completions/knowsam.fish                    # every new fish

Make it anew after knowsam was updated: the script holds the commands and options of the version that made it.
exit codes: 0 done, 2 no such shell.
"""

YAML, FOLDER, FILE, ANY = "yaml", "folder", "file", "any"

# What the help calls a value -> what may stand there; anything else is not completed.
KINDS = (
    dict.fromkeys(("YAML", "EXPERIMENT", "EXPERIMENT.yaml", "SWEEP.yaml"), YAML)
    | dict.fromkeys(("DIR", "FOLDER", "RUN", "RUNS", "PATH"), FOLDER)
    | dict.fromkeys(("FILE", "CSV", "INPUT", "OUT", "NAME|FILE", "EXPERIMENT|FOLDER", "PAGE.html"), FILE)
    | dict.fromkeys(("SGDL_best_model.pth", "sam_best_model.pth"), FILE)
)

# What a command takes in the place of a file and its parser does not list.
UNLISTED = {
    "check-method": tuple(METHODS),
    "sweep": ("work", "status"),
    "weights": tuple(WEIGHTS),
    "benchmark": ("step", "parts", "data", "inference", "prediction", "startup", "processes"),
}


@dataclass(frozen=True)
class Argument:
    """An option, or a positional argument of a command.

    Attributes:
        flags: such as ``-o`` and ``--output``; none for a positional argument.
        kind: what its value is: ``yaml``, ``folder``, ``file``, ``any``; empty for an option without one.
        choices: the values there are, if they are few.
        help: one line.
        many: a positional argument that may be repeated.
    """

    flags: tuple[str, ...]
    kind: str
    choices: tuple[str, ...] = ()
    help: str = ""
    many: bool = False


@dataclass(frozen=True)
class Command:
    """A command of ``knowsam``: its options, and its positional arguments in their order."""

    name: str
    help: str
    options: tuple[Argument, ...]
    positionals: tuple[Argument, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=tuple(SHELLS))


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(SHELLS[args.shell](list(commands())), end="")
    return 0


def commands() -> Iterator[Command]:
    """Every command, read from the parser that it really uses."""
    from knowsam.cli.main import COMMANDS

    for name, (module, text) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        arguments = [_argument(name, action) for action in parser._actions]
        options = tuple(argument for argument in arguments if argument.flags)
        yield Command(name, text, options, tuple(argument for argument in arguments if not argument.flags))


def _argument(command: str, action: argparse.Action) -> Argument:
    flags = tuple(action.option_strings)
    value = action.nargs != 0
    about = (action.help or "").replace("%%", "%")
    if str(action.metavar).lower() == "key=value":
        return Argument(flags, ANY, tuple(override_keys()), about, many=True)
    choices = tuple(str(choice) for choice in action.choices or ())
    choices += () if flags or choices else UNLISTED.get(command, ())
    return Argument(flags, _kind(action) if value else "", choices, about, action.nargs in ("*", "+"))


def _kind(action: argparse.Action) -> str:
    """What a value is, from the name that the help gives it; a positional argument without one goes by its own."""
    name = action.metavar or ("" if action.option_strings else action.dest.upper())
    return KINDS.get(str(name), ANY)


def override_keys() -> list[str]:
    """``train.seed=``, ``method.name=`` and so on: what ``key=value`` may begin with."""
    from knowsam import components
    from knowsam.config.schema import Config

    keys = []
    for item in fields(Config):
        if is_dataclass(item.type):
            keys += [f"{item.name}.{inner.name}=" for inner in fields(item.type)]
        else:
            keys.append(f"{item.name}=" if item.name in ("name", "run", "published_code") else f"{item.name}.")
    blocks: dict[str, tuple[str, Mapping[str, str]]] = {
        "method": ("method", components.METHODS),
        "fusion": ("fusion", components.FUSION_HEADS),
        "data.source": ("source", components.SOURCES),
        "data.intensity": ("intensity", components.INTENSITIES),
        **{f"sam.{part}": (part, table) for part, (table, _) in components.SAM_PARTS.items() if part != "tuning"},
        "optim.subnets": ("optim", components.OPTIMIZERS),
        "optim.sam": ("optim", components.OPTIMIZERS),
        "sam": ("sam", {"": components.SAM_GUIDE}),
        "skd": ("skd", {"": components.SKD}),
        "augment": ("augment", components.AUGMENTERS),
    }
    for place, (kind, table) in blocks.items():
        keys += [] if "" in table else [f"{place}.name="]
        for target in table.values():
            keys += _options(place, target, components.OFFERED[kind])
    return list(dict.fromkeys(keys))


def _options(place: str, target: str, offered: Collection[str]) -> list[str]:
    """Settings of a component, and of the blocks of options within it."""
    from knowsam import components

    found = []
    for name, parameter in components.signature(target).items():
        if name in offered:
            continue
        within = _options(f"{place}.{name}", parameter.options, ()) if parameter.options else []
        found += within or [f"{place}.{name}="]
    return found


# ---------------------------------------------------------------- bash

_BASH = """\
# Completion of knowsam for bash, made by: knowsam completion bash
_knowsam_choices() {
    local IFS=$' \\n'
    COMPREPLY+=( $(compgen -W "$1" -- "$cur") )
}
_knowsam_files() {
    local IFS=$'\\n'
    compopt -o filenames 2>/dev/null
    COMPREPLY+=( $(compgen -d -- "$cur") )
    case $1 in
        yaml) COMPREPLY+=( $(compgen -f -X '!*.yaml' -- "$cur") $(compgen -f -X '!*.yml' -- "$cur") ) ;;
        file) COMPREPLY=( $(compgen -f -- "$cur") ) ;;
    esac
}
_knowsam() {
    local cur=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} place=0 i word after=
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        _knowsam_choices "@COMMANDS@ --help --version"
        return
    fi
    # The option whose value stands here, if one does; and how many positional arguments stand before.
    for (( i = 2; i < COMP_CWORD; i++ )); do
        word=${COMP_WORDS[i]}
        if [[ -n $after ]]; then
            after=
        elif [[ $word == -* ]]; then
            case "$command $word" in
                @VALUED@) after=$word ;;
            esac
        elif [[ $word != "=" && ${COMP_WORDS[i-1]} != "=" ]]; then
            (( place += 1 ))
        fi
    done
    if [[ -n $after ]]; then
        case "$command $after" in
@VALUES@
        esac
        return
    fi
    if [[ $cur == -* ]]; then
        case $command in
@OPTIONS@
        esac
        return
    fi
    case "$command $place" in
@POSITIONALS@
    esac
}
complete -F _knowsam knowsam
"""


def bash(commands: list[Command]) -> str:
    """The script for bash, 3.2 or newer."""
    values, options, positionals, valued = [], [], [], []
    for command in commands:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        options.append(f'            {command.name}) _knowsam_choices "{flags}" ;;')
        for option in command.options:
            if not option.kind:
                continue
            pattern = "|".join(f'"{command.name} {flag}"' for flag in option.flags)
            values.append(f"            {pattern}) {_bash_values(option)} ;;")
            # `--option [VALUE]` may stand alone, but then what follows looks like a value to every reader.
            valued.append(pattern)
        for place, argument in enumerate(command.positionals):
            pattern = f'"{command.name} "*' if argument.many else f'"{command.name} {place}"'
            positionals.append(f"        {pattern}) {_bash_values(argument)} ;;")
    return (
        _BASH.replace("@COMMANDS@", " ".join(command.name for command in commands))
        .replace("@VALUED@", "|".join(valued))
        .replace("@VALUES@", "\n".join(values))
        .replace("@OPTIONS@", "\n".join(options))
        .replace("@POSITIONALS@", "\n".join(positionals))
    )


def _bash_values(argument: Argument) -> str:
    parts = [f"_knowsam_files {argument.kind}"] if _files_too(argument) else []
    parts += [f'_knowsam_choices "{" ".join(argument.choices)}"'] if argument.choices else []
    if any(choice.endswith(("=", ".")) for choice in argument.choices):
        parts.append("compopt -o nospace 2>/dev/null")
    return "; ".join(parts) or ":"


def _files_too(argument: Argument) -> bool:
    """Whether files are offered, beside choices if there are some."""
    return argument.kind in (YAML, FILE) or (argument.kind == FOLDER and not argument.choices)


# ---------------------------------------------------------------- zsh

_ZSH_FILES = {YAML: '_files -g "*.(yaml|yml)"', FOLDER: "_files -/", FILE: "_files", ANY: ""}


def zsh(commands: list[Command]) -> str:
    """The script for zsh."""
    lines = ["#compdef knowsam", "# Completion of knowsam for zsh, made by: knowsam completion zsh", "_knowsam() {"]
    lines += ["    local -a commands", "    commands=("]
    lines += [f"        {_quote(f'{command.name}:{_colons(command.help)}')}" for command in commands]
    lines += [
        "    )",
        "    if (( CURRENT == 2 )); then",
        "        _describe command commands",
        "        return",
        "    fi",
        "    shift words",
        "    (( CURRENT -= 1 ))",
        "    case $words[1] in",
    ]
    for command in commands:
        lines.append(f"        {command.name})")
        lines.append("            _arguments \\")
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        specs += [_zsh_positional(place, argument) for place, argument in enumerate(command.positionals, 1)]
        lines += [f"                {_quote(spec)} \\" for spec in specs[:-1]]
        lines += [f"                {_quote(specs[-1])}", "            ;;"]
    lines += [
        "    esac",
        "}",
        'if [[ $funcstack[1] == _knowsam ]]; then _knowsam "$@"; else compdef _knowsam knowsam; fi',
    ]
    return "\n".join(lines) + "\n"


def _zsh_option(option: Argument) -> Iterator[str]:
    about = _colons(option.help).replace("[", "\\[").replace("]", "\\]")
    for flag in option.flags:
        yield f"{flag}[{about}]" + (f":value:{_zsh_values(option)}" if option.kind else "")


def _zsh_positional(place: int, argument: Argument) -> str:
    return f"{'*' if argument.many else place}:{_colons(argument.help) or 'argument'}:{_zsh_values(argument)}"


def _zsh_values(argument: Argument) -> str:
    if any(choice.endswith(("=", ".")) for choice in argument.choices):
        return f' compadd -S "" -- {" ".join(argument.choices)}'  # no space after `=`
    if argument.choices and _files_too(argument):
        return f'_alternative "choices\\:choice\\:({" ".join(argument.choices)})" "files\\:file\\:_files"'
    return f"({' '.join(argument.choices)})" if argument.choices else _ZSH_FILES[argument.kind]


def _colons(text: str) -> str:
    return text.replace(":", "\\:")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# ---------------------------------------------------------------- fish


def fish(commands: list[Command]) -> str:
    """The script for fish."""
    lines = ["# Completion of knowsam for fish, made by: knowsam completion fish", "complete -c knowsam -f"]
    for command in commands:
        lines.append(f"complete -c knowsam -n __fish_use_subcommand -a {command.name} -d {_fish_quote(command.help)}")
    for command in commands:
        seen = f"complete -c knowsam -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            flags = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in option.flags)
            value = f" {_fish_values(option)}" if option.kind else ""
            lines.append(f"{seen} {flags}{value} -d {_fish_quote(option.help)}")
        for argument in command.positionals:
            if argument.choices:
                lines.append(f"{seen} -a '{' '.join(argument.choices)}'")
            if _files_too(argument):
                lines.append(f"{seen} -F")
    return "\n".join(lines) + "\n"


def _fish_values(option: Argument) -> str:
    if option.choices:
        return f"-x -a '{' '.join(option.choices)}'"
    if option.kind == FOLDER:
        return "-x -a '(__fish_complete_directories)'"
    return "-x" if option.kind == ANY else "-r -F"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[list[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
