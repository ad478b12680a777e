"""What may import what: an arrow down never goes up, and verbs leave each other alone."""

import ast
from pathlib import Path

import fluxjax

HOUSE = Path(fluxjax.__file__).parent
FLOORS = ["config", "models", "networks", "text", "parallel", "checkpoint", "schedules", "families"]
"""From the lowest on; a file may import what is below its room, and its own room."""
BELOW = {room: set(FLOORS[: i + 1]) for i, room in enumerate(FLOORS)}
# Steps of samplers are tables of numbers.
BELOW["schedules"] = {"config", "schedules"}
USED = {
    "sample": {"sample"},
    "convert": {"convert"},
    "train": {"train", "sample"},
    # What they count, measure and compare is what sampling and training run.
    "plan": {"plan", "sample", "train"},
    "diff": {"diff", "sample", "train"},
}
BELOW |= {verb: {*FLOORS, *used} for verb, used in USED.items()}
ROOMS = set(BELOW)


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of all, also of those within functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


def test_rooms_import_what_is_below_them_and_nothing_private():
    wrong = []
    for path in HOUSE.rglob("*.py"):
        room, *_ = path.relative_to(HOUSE).parts
        for module, name in imports(path):
            package, _, rest = module.partition(".")
            if package != "fluxjax":
                continue
            target = (rest or name).partition(".")[0]
            above = room in ROOMS and target in ROOMS and target not in BELOW[room]
            if above or (name.startswith("_") and not name.startswith("__")):
                wrong.append(f"{path.relative_to(HOUSE)}: {module} {name}")
    assert not wrong, "\n".join(wrong)


def test_torch_and_transformers_are_imported_by_diff_alone():
    wrong = [
        f"{path.relative_to(HOUSE)}: {module}"
        for path in HOUSE.rglob("*.py")
        if path.relative_to(HOUSE).parts[0] != "diff"
        for module, _ in imports(path)
        if module.partition(".")[0] in ("torch", "transformers", "diffusers", "peft")
    ]
    assert not wrong, "\n".join(wrong)


def test_named_shapes_are_checked_wherever_they_stand(request):
    """pytest's options name the packages whose annotations hold at run time."""
    checked = request.config.getoption("--jaxtyping-packages").split(",")
    named, unchecked = 0, []
    for path in HOUSE.rglob("*.py"):
        module = ".".join(("fluxjax", *path.relative_to(HOUSE).with_suffix("").parts))
        if any(of == "jaxtyping" for of, name in imports(path) if name != "Array"):
            named += 1
            if not any(f"{module}.".startswith(f"{package}.") for package in checked):
                unchecked.append(module)
    assert named > 100 and not unchecked
