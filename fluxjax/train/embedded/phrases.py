"""The words and phrases of captions, from which `phrasing` draws; what stands twice is likelier."""

SIZE_WORDS = (
    ("small", "little", "tiny"),
    ("medium", "midsized"),
    ("large", "big", "huge"),
)
COLOUR_WORDS = {
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "gray": ("gray", "grey"),
}
BACKGROUND_WORDS = {"gray": ("gray", "grey"), "navy": ("navy", "navy", "navy blue")}
SHAPE_WORDS = {
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "donut"),
    "diamond": ("diamond", "diamond", "rhombus"),
}
PLURALS = {"rhombus": "rhombuses", "cross": "crosses"}
NUMBERS = {
    1: ("one", "1", "a single"),
    2: ("two", "2", "a pair of"),
    3: ("three", "3", "a group of three"),
}
BARE_NUMBERS = {1: ("one", "1", "single"), 2: ("two", "2", "pair of"), 3: ("three", "3")}
OPENINGS = (
    *[""] * 7,
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "there is ",
    "we see ",
    "i see ",
    "draw ",
    "please draw ",
    "show me ",
    "i want ",
    "a picture with ",
)

# What stands where, in the order of RELATIONS; {a} is the object that stands so to {b}.
SENTENCES = (
    (
        "{a} to the left of {b}",
        "{a} on the left of {b}",
        "{a} on the left side of {b}",
        "{a} left of {b}",
        "{b} with {a} on its left",
        "{a} on the left and {b} on the right",
        "on the left {a}, on the right {b}",
    ),
    (
        "{a} to the right of {b}",
        "{a} on the right of {b}",
        "{a} on the right side of {b}",
        "{a} right of {b}",
        "{b} with {a} on its right",
        "{a} on the right and {b} on the left",
        "on the right {a}, on the left {b}",
    ),
    (
        "{a} above {b}",
        "{a} over {b}",
        "{b} with {a} above it",
        "{a} on top and {b} below",
        "{a} higher than {b}",
        "{a} on top of {b}",
    ),
    (
        "{a} below {b}",
        "{a} under {b}",
        "{b} with {a} below it",
        "{a} at the bottom and {b} on top",
        "{a} beneath {b}",
        "{a} underneath {b}",
    ),
)
TERSE = (
    (
        "{a} left of {b}",
        "{a} to left of {b}",
        "{a} to the left, {b} to the right",
        "{a} left, {b} right",
        "{a} on left, {b} on right",
        "left {a}, right {b}",
        "left: {a}, right: {b}",
        "{b}, {a} on its left",
    ),
    (
        "{a} right of {b}",
        "{a} to right of {b}",
        "{a} to the right, {b} to the left",
        "{a} right, {b} left",
        "{a} on right, {b} on left",
        "right {a}, left {b}",
        "right: {a}, left: {b}",
        "{b}, {a} on its right",
    ),
    (
        "{a} above {b}",
        "{a} over {b}",
        "{a} on top of {b}",
        "{a} top, {b} bottom",
        "{a} above, {b} below",
        "top {a}, bottom {b}",
        "top: {a}, bottom: {b}",
        "{b}, {a} above it",
    ),
    (
        "{a} below {b}",
        "{a} under {b}",
        "{a} beneath {b}",
        "{a} underneath {b}",
        "{a} bottom, {b} top",
        "{a} below, {b} above",
        "bottom {a}, top {b}",
        "{b}, {a} below it",
    ),
)
FRONTED = (
    (
        "to the left of {b} there is {a}",
        "to the left of {b} is {a}",
        "left of {b} we see {a}",
        "left of {b}, {a}",
        "{b} has {a} on its left",
        "{b}, and to its left {a}",
        "{a} with {b} on its right",
        "{a} is to the left of {b}",
        "{a} is left of {b}",
    ),
    (
        "to the right of {b} there is {a}",
        "to the right of {b} is {a}",
        "right of {b} we see {a}",
        "right of {b}, {a}",
        "{b} has {a} on its right",
        "{b}, and to its right {a}",
        "{a} with {b} on its left",
        "{a} is to the right of {b}",
        "{a} is right of {b}",
    ),
    (
        "above {b} there is {a}",
        "over {b} there is {a}",
        "above {b} is {a}",
        "above {b}, {a}",
        "on top of {b} there is {a}",
        "{b} has {a} above it",
        "{b}, and above it {a}",
        "at the top {a}, at the bottom {b}",
        "{a} with {b} underneath",
        "{a} at the top and {b} at the bottom",
        "{a} with {b} below it",
        "{a} is above {b}",
    ),
    (
        "below {b} there is {a}",
        "under {b} there is {a}",
        "beneath {b} is {a}",
        "under {b} is {a}",
        "under {b}, {a}",
        "underneath {b} we see {a}",
        "{b} has {a} below it",
        "{b}, and under it {a}",
        "at the bottom {a}, at the top {b}",
        "{a} at the bottom and {b} at the top",
        "{a} with {b} above it",
        "{a} is below {b}",
    ),
)
ROWS = (
    "{a}, {b} and {c}",
    "{a}, {b} and {c} in a row",
    "from left to right {a}, {b} and {c}",
    "a row of {a}, {b} and {c}",
)
TERSE_ROWS = (
    "{a}, {b}, {c}",
    "{a}, {b}, {c} in a row",
    "row: {a}, {b}, {c}",
    "left to right: {a}, {b}, {c}",
    "{a} left of {b} left of {c}",
    "row of {a}, {b} and {c}",
)
FRONTED_ROWS = (
    "in a row, {a}, {b} and {c}",
    "in a row: {a}, {b}, {c}",
    "from left to right: {a}, {b}, {c}",
    "{a} on the left, {b} in the middle and {c} on the right",
    "side by side {a}, {b} and {c}",
)
# Named in reading order. With "next to" the two stand beside each other, whichever comes first.
AND = (
    "{a} and {b}",
    "{a} and {b}",
    "{a} and {b}",
    "{a} & {b}",
    "{a} with {b}",
    "{a}, {b}",
)
BESIDE = (
    "{a} next to {b}",
    "{a} beside {b}",
    "{a} and {b} side by side",
    "{a} and {b} in a row",
    "{a} by the side of {b}",
    "{a} and {b} next to each other",
    "{a} is next to {b}",
)
AND_ROWS = (
    "{a}, {b} and {c}",
    "{a} and {b} and {c}",
    "{a} & {b} & {c}",
    "{a}, {b}, {c}",
    "{a} next to {b} next to {c}",
    "{a}, {b}, and {c}",
)

LAST = (
    (
        "on a {0} background",
        "on {0}",
        "against a {0} background",
        "with a {0} background",
        "in front of a {0} background",
    ),
    (
        "on a background that is {0} above and {1} below",
        "with a {0} top half and a {1} bottom half",
    ),
    ("with the left half {0} and the right half {1}", "with a {0} left half and a {1} right half"),
)
TERSE_LAST = (
    (
        ", {0} background",
        ", {0} background",
        " on {0}",
        " on {0} background",
        ", background {0}",
        ", background color {0}",
        ", background: {0}",
        " against {0}",
        " with {0} background",
        ", on {0}",
    ),
    (
        ", {0} top half, {1} bottom half",
        ", top half {0}, bottom half {1}",
        ", background {0} above, {1} below",
        ", {0} above and {1} below background",
    ),
    (
        ", {0} left half, {1} right half",
        ", left half {0}, right half {1}",
        ", background {0} left, {1} right",
    ),
)
TERSE_FIRST = (
    (
        "{0} background, ",
        "{0} background: ",
        "{0} background with ",
        "on {0}: ",
        "on {0}, ",
        "background {0}, ",
    ),
    ("{0} top half, {1} bottom half, ", "top half {0}, bottom half {1}: "),
    ("{0} left half, {1} right half, ", "left half {0}, right half {1}: "),
)
FIRST = (
    (
        "on a {0} background, ",
        "on a {0} background ",
        "on a {0} background there is ",
        "a {0} background with ",
        "against a {0} background, ",
        "the background is {0}, with ",
        "background colour {0}, ",
        "in front of a {0} background ",
        "on {0}, ",
    ),
    (
        "with a {0} top half and a {1} bottom half, ",
        "on a background {0} above and {1} below, ",
        "the top half is {0} and the bottom half {1}, with ",
    ),
    (
        "with a {0} left half and a {1} right half, ",
        "the left half is {0} and the right half {1}, with ",
    ),
)
