"""What the READMEs name exists, and every room and file of the repository is described in one of them."""

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from colt5dist.marks import KEEPS_RESULT
from colt5dist.train.config.differences import marked_keys
from colt5dist.train.config.load import config_leaves
from colt5dist.train.config.schema import SECTIONS, RunConfig

ROOT = Path(__file__).resolve().parents[1]
TOP = ROOT / "README.md"
PAGES = [
    TOP,
    *(page for name in ("launch", "configs", "colt5dist", "tests") for page in (ROOT / name).rglob("README.md")),
]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

OF_A_RUN = {"config.yaml", "map.png", "map_kinds.png"}
"""Files that look like the repository's and are written by a command."""
OF_OTHERS = {
    "--num_gpus": "deepspeed",
    "--num_accelerators": "deepspeed",
    "--no_ssh": "deepspeed",
    "--module": "deepspeed",
    "--node_rank": "deepspeed",
    "--master_addr": "deepspeed",
    "--master_port": "deepspeed",
    "--dist": "pytest-xdist",
    "--nproc-per-node": "torchrun",
    "--standalone": "torchrun",
    "--partition": "srun",
    "--nodes": "srun",
    "--ntasks-per-node": "srun",
    "--gpus-per-node": "srun",
    "--cpus-per-task": "srun",
    "--logdir": "tensorboard",
    "--samples_per_plugin": "tensorboard",
    "--signal": "sbatch",
    "--container-image": "srun",
    "--container-mounts": "srun",
    "--pty": "srun",
    "--no-deps": "pip",
    "--help": "argparse",
}
"""Options of other programs."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def code_spans(text: str) -> list[str]:
    """What stands between backticks, and the lines of the code blocks, comments left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    return spans + [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def section(page: Path, title: str) -> str:
    """The text below a heading, up to the next heading of any level."""
    return re.split(r"^#+ .*\n", TEXTS[page].split(f"# {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows, without those of headings and rules."""
    lines = re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)
    rules = {number for number, line in enumerate(lines) if set(line) <= set("|-")}
    kept = [line for number, line in enumerate(lines) if number not in rules and number + 1 not in rules]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in kept]


def options_in(path: Path) -> set[str]:
    """Options that a program takes, as far as its source spells them out."""
    return set(re.findall(r"\badd(?:_argument)?\(\s*\"(--[a-z][\w-]*)\"", path.read_text(encoding="utf-8")))


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def rooms() -> list[Path]:
    """Folders of the package with modules, and those beside it."""
    package = ROOT / "colt5dist"
    inner = [path.parent for depth in ("*", "*/*") for path in package.glob(f"{depth}/__init__.py")]
    return [ROOT / "launch", ROOT / "configs", ROOT / "tests", *sorted(inner)]


@every_page
def test_named_files_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./*<-])(?:[\w-]+/)*[\w-]+\.(?:py|yaml|png|md)\b", TEXTS[page])) - OF_A_RUN
    named |= set(re.findall(r"(?<![\w./-])(?:tests|configs|launch|colt5dist)/[\w./-]*[\w/]", TEXTS[page]))
    places = (page.parent, ROOT, ROOT / "launch")
    assert [name for name in sorted(named) if not any((place / name).exists() for place in places)] == []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        name, _, anchor = link.partition("#")
        if ":" in name:
            continue
        target = (page.parent / name).resolve() if name else page
        headings = re.findall(r"^#+ (.+)$", TEXTS.get(target, ""), flags=re.MULTILINE)
        if not target.exists() or (anchor and anchor not in map(slug, headings)):
            broken.append(link)
    assert broken == []


@every_page
def test_named_modules_and_classes_exist(page: Path) -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "colt5dist").rglob("*.py"))
    missing = []
    for name in set(re.findall(r"(?<![\w./-])colt5dist(?:\.\w+)+", TEXTS[page])):
        parts = name.split(".")
        found: Any = importlib.import_module(parts[0])
        for number, part in enumerate(parts[1:], start=2):
            if importlib.util.find_spec(".".join(parts[:number])) if hasattr(found, "__path__") else None:
                found = importlib.import_module(".".join(parts[:number]))
            elif hasattr(found, part):
                found = getattr(found, part)
            else:
                missing.append(name)
                break
    for name in {span for span in code_spans(TEXTS[page]) if re.fullmatch(r"[A-Z]\w*[a-z]\w*", span)}:
        if not re.search(rf"^class {name}\b", source, flags=re.MULTILINE):
            missing.append(name)
    assert missing == []


@every_page
def test_named_keys_exist(page: Path) -> None:
    keys = config_leaves(RunConfig())
    named = set(re.findall(rf"(?<![\w./*-])(?:{'|'.join(SECTIONS)})\.\w+", " ".join(code_spans(TEXTS[page]))))
    files = (".py", ".yaml", ".json", ".bin", ".md", ".safetensors")
    assert [key for key in sorted(named) if key not in keys and not key.endswith(files)] == []


def test_keys_of_the_configuration_page_exist() -> None:
    text = TEXTS[ROOT / "configs" / "README.md"]
    tables = [part for part in re.split(r"^#+ .*\n", text, flags=re.MULTILINE) if "| key | meaning |" in part]
    named = [key for table in tables for row in rows(table) for key in re.findall(r"`(.+?)`", row[0])]
    assert len(named) > 45
    assert [key for key in named if key not in config_leaves(RunConfig())] == []


def test_keys_that_a_resumed_run_may_change() -> None:
    bullets = section(ROOT / "configs" / "README.md", "What a resumed run may change").split("\n\nAny other")[0]
    marked, leaves = marked_keys(KEEPS_RESULT), config_leaves(RunConfig())
    whole = {s for s in SECTIONS if all(key in marked for key in leaves if key.startswith(f"{s}."))}
    keys = {key for key in marked if key.split(".")[0] not in whole and key.split("[]")[0] not in marked - {key}}
    assert set(re.findall(r"`(.+?)`", bullets)) == whole | keys


@every_page
def test_named_options_exist(page: Path) -> None:
    programs = [*(ROOT / "launch").glob("*.py"), *(ROOT / "colt5dist").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    known = set().union(*map(options_in, (path for path in programs if path != Path(__file__).resolve())))
    assert [option for option in sorted(set(OPTION.findall(TEXTS[page]))) if option not in known | set(OF_OTHERS)] == []


def test_options_of_deepspeed_exist() -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec and spec.origin
    runner = (Path(spec.origin).parent / "launcher" / "runner.py").read_text(encoding="utf-8")
    assert [option for option, program in OF_OTHERS.items() if program == "deepspeed" and option not in runner] == []


@every_page
def test_commands_take_their_options(page: Path) -> None:
    """Each option after the name of a program is one of that program's."""
    settings = ROOT / "colt5dist" / "data" / "prepare" / "settings.py"
    wrong = []
    for span in code_spans(TEXTS[page]):
        for match in re.finditer(r"(?:^|\s)((?:launch|tests)/\w+\.py|prepare\.py)( [a-z_]+)?(?: (.*))?$", span):
            name, verb, arguments = match[1], (match[2] or "").strip(), match[3] or ""
            source = ROOT / name
            if name.endswith("prepare.py"):
                source = settings
            elif name == "launch/benchmark.py" and verb:
                source = ROOT / "colt5dist" / "benchmark" / f"{verb}.py"
                assert source.exists(), span
            known = options_in(source) | {"--help"}
            wrong += [f"{name} {option}" for option in OPTION.findall(arguments) if option not in known]
    assert wrong == []


def test_options_of_the_commands_are_described() -> None:
    page = ROOT / "launch" / "README.md"
    described = set(OPTION.findall(section(page, "pretrain.py")))
    assert described - {"--help"} == options_in(ROOT / "launch" / "pretrain.py") - {"--local_rank"}
    described = set(OPTION.findall(section(page, "prepare.py")))
    assert described == options_in(ROOT / "colt5dist" / "data" / "prepare" / "settings.py")


@pytest.mark.parametrize("folder", ["colt5dist/benchmark", "tests"])
def test_options_of_benchmarks_and_scripts_are_described(folder: str) -> None:
    page = ROOT / folder / "README.md"
    table = [row for row in rows(TEXTS[page]) if OPTION.search(row[-1]) and re.fullmatch(r"`[\w/]+\.py`", row[0])]
    assert len(table) >= 5
    for row in table:
        name = row[0].strip("`")
        program = next(path for path in (page.parent / name, ROOT / name) if path.exists())
        assert set(OPTION.findall(row[-1])) - {"--help"} == options_in(program), name


def test_measured_figures_of_the_top_are_on_the_full_page() -> None:
    full = TEXTS[ROOT / "colt5dist" / "benchmark" / "README.md"]
    table = rows(section(TOP, "Measured speed"))
    assert len(table) >= 5
    for what, figure, run in table:
        numbers = re.findall(r"\d[\d.,]*\d|\d", figure)
        assert numbers and [number for number in numbers if number not in full] == [], what
        command = re.findall(r"`(.+?)`", run)[0]
        assert all(part in full for part in command.replace("...", "").split()), command
        assert re.search(r"\d{4}-\d\d-\d\d$", run), run


def test_guarantees_name_a_test() -> None:
    tables = TEXTS[ROOT / "tests" / "README.md"].split("\n## ")
    guarantees = [row for table in tables if "| guarantee | test |" in table for row in rows(table)]
    assert len(guarantees) >= 45
    assert [row[0] for row in guarantees if not re.search(r"`tests/[\w/]+\.py", row[1])] == []


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(ROOT)))
def test_rooms_and_their_files_are_described(room: Path) -> None:
    page = room / "README.md"
    if room.parent.name == "ops":  # the operators share one page
        page = room.parent / "README.md"
    assert page in TEXTS, f"{room} has no README"
    spans = set(code_spans(TEXTS[page]))
    base = ROOT if room.name == "tests" else page.parent
    files = [*room.glob("*.py")] if room.name != "tests" else [*room.rglob("*.py")]
    files += room.rglob("*.yaml")
    names = [path.relative_to(base).as_posix() for path in files if path.name != "__init__.py"]
    if not names:
        names = [f"{room.relative_to(base).as_posix()}/"]
    assert [name for name in sorted(names) if name not in spans] == []


def test_modules_beside_the_rooms_are_described() -> None:
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "colt5dist").glob("*.py")]
    spans = code_spans(TEXTS[TOP])
    assert [name for name in files if not name.endswith("__init__.py") and name not in spans] == []


def test_rooms_of_the_map_are_the_rooms_that_are_there() -> None:
    named = {room for row in rows(section(TOP, "The map")) for room in re.findall(r"`([\w/]+)/`", row[0])}
    there = {str(room.relative_to(ROOT)) for room in rooms() if len(room.relative_to(ROOT).parts) < 3}
    assert named == there
    for parent in ("train", "data", "nn"):
        (row,) = (row for row in rows(section(TOP, "The map")) if f"`colt5dist/{parent}/`" in row[0])
        inner = {path.parent.name for path in (ROOT / "colt5dist" / parent).glob("*/__init__.py")}
        assert set(re.findall(r"`(\w+)/`", row[1])) == inner


def test_metrics_are_written_under_these_names() -> None:
    folders = (ROOT / "colt5dist" / "train", ROOT / "colt5dist" / "model")
    source = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    table = rows(section(ROOT / "colt5dist" / "train" / "report" / "README.md", "metrics.jsonl"))
    keys = [key for row in table for key in re.findall(r"`(.+?)`", row[0])]
    assert len(keys) > 20
    parts = [re.sub(r"/(OBJECTIVE|ROUTER)$", "", key).split("/")[-1] for key in keys]
    assert [part for part in parts if not re.search(rf"\b{part}\b", source)] == []


def test_the_two_commands() -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", section(TOP, "Two commands"), flags=re.DOTALL)
    commands = [line.split("  #")[0].strip() for line in block.splitlines()]
    assert commands == ["pip install -e . && deepspeed launch/pretrain.py", "pip install -e '.[test]' && pytest"]


def test_named_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name for text in TEXTS.values() for names in re.findall(r"\.\[([\w,]+)\]", text) for name in names.split(",")
    }
    named |= {name for text in TEXTS.values() for name in re.findall(r"extra\s+`(\w+)`", text)}
    assert named and named <= set(extras)


def test_the_library_example_runs() -> None:
    blocks = {page: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for page, text in TEXTS.items()}
    assert {page for page, found in blocks.items() if found} == {ROOT / "colt5dist" / "nn" / "README.md"}
    (code,) = blocks[ROOT / "colt5dist" / "nn" / "README.md"]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["out"].shape == (2, 4096, 256)
    assert names["weights"].sum(dim=-1).tolist() == pytest.approx([512.0, 512.0], rel=1e-3)


def test_the_top_page_is_short() -> None:
    assert len(TEXTS[TOP].splitlines()) < 150


@every_page
def test_lines_are_no_longer_than_the_code(page: Path) -> None:
    assert [line for line in TEXTS[page].splitlines() if len(line) > 120 and not line.startswith("|")] == []
