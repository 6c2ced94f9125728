"""The table of docs/options.md, from the first lines of the option files: `python tests/options_table.py` rewrites it."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- groups: made by tests/options_table.py -->\n", "<!-- end of groups -->"


def describe(option: Path) -> str:
    """The first comment of an option file that is not an instruction to Hydra."""
    lines = (line.lstrip("# ") for line in option.read_text(encoding="utf-8").splitlines())
    return next(line for line in lines if line and not line.startswith("@package"))


def table() -> str:
    """One row an option, the group's name at its first."""
    rows = ["| group | option | what it is |", "|---|---|---|"]
    defaults = (ROOT / "conf/train.yaml").read_text(encoding="utf-8").split("task:")[0]
    groups = [
        line.split(":")[0].strip("- ") for line in defaults.splitlines() if line.startswith("  - ") and ": " in line
    ]
    for group in groups:
        for number, option in enumerate(sorted((ROOT / "conf" / group).glob("*.yaml"))):
            rows.append(f"| {f'`{group}`' if number == 0 else ''} | `{option.stem}` | {describe(option)} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    path = ROOT / "docs/options.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
