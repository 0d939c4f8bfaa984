"""English text without information, made of lists of words, as the haystack of a needle.

It is generated, so that nothing has to be downloaded and no model has been trained on it.
"""

from __future__ import annotations

from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient autumn bare bitter blue bold brave brief bright brisk broad bronze busy calm careful cheap clean clear "
    "clever cloudy coarse cold cosy crisp curious damp daring dark deep distant dry dull dusty eager early easy empty "
    "fair faint famous fancy fast fine firm flat fond frail fresh gentle giant glad golden grand grave great green grey "
    "happy hard harsh heavy hidden hollow honest humble icy idle keen kind lame large late lazy lean light little lively "
    "lone long loose loud loyal lucky mild modest narrow neat new noble noisy odd old orange pale patient plain polite "
    "poor proud pure quick quiet rare red rich ripe rough round royal rural rusty sad scarlet secret shallow sharp short "
    "shy silent silver simple slim slow small smooth snowy soft solid sour square steady steep stern stiff still strange "
    "strict strong sunny sweet swift tall tame thick thin tidy tiny tired tough vast violet warm weak weary wet white "
    "wide wild wise wooden yellow young"
)
NOUNS = _words(
    "anchor apple arch arrow attic baker balcony banner barn barrel basin basket beach beacon bell bench bicycle bishop "
    "blanket boat bottle bowl branch bridge brook brush bucket button cabin candle canal captain carpet carriage castle "
    "cellar chapel cherry chimney clock cloud coat coin copper corner cottage cousin cradle crown cup curtain dancer desk "
    "diary doctor donkey door dragon drawer drum eagle engine falcon farmer feather fence ferry fiddle field finger fire "
    "fisher flag flower flute forest fountain fox frame garden gardener gate ghost glacier glove goat goose grain guard "
    "guest hammer harbour harvest hat hedge helmet heron hill horse hotel house island jacket jar jewel judge kettle key "
    "kitchen kite ladder lake lamp lantern leaf lemon letter library lion lock mantle map maple market meadow melon "
    "merchant mill miller mirror monk moon mountain museum nail needle neighbour nest nurse oak ocean officer orchard "
    "organ otter oven owl painter palace paper parcel path pear pencil pepper piano pigeon pillow pilot pine pipe plate "
    "plough plum pocket poet pond porch potter prince pupil puzzle quarry queen rabbit raft railway raven ribbon ring "
    "river road robin roof rope rose sailor salmon scarf school shelf shepherd ship shoe shore singer sister sled spoon "
    "spring stable station statue stone storm stove stream street sugar swan table tailor teacher temple tent thread "
    "tower train tree tunnel turtle uncle valley velvet village vine violin wagon wall watch waterfall well whale wheel "
    "willow window wolf wool writer yard"
)
VERBS = _words(
    "admires avoids borrows builds buys carries chooses cleans covers crosses describes draws enjoys examines fills finds "
    "follows forgets guards hears helps hides holds ignores keeps leaves lifts likes mends misses moves needs notices "
    "offers opens paints passes praises protects pulls pushes reaches remembers repairs returns reveals sells shares "
    "shows studies surrounds touches visits washes watches welcomes wraps"
)
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))
"""All words, each once."""

_PLACES = ("near the", "behind the", "beside the", "above the", "below the", "far from the", "opposite the", "around the")
_TIMES = (
    *(
        "In the morning",
        "Before noon",
        "After dinner",
        "At night",
        "In winter",
        "During the summer",
        "Every week",
        "Once a year",
    ),
    *("Long ago", "Now and then", "On most days", "As a rule", "Without a sound", "To nobody's surprise", "For no reason"),
)


def sentence(random: Random) -> str:
    """Make a sentence of about ten words; there are more than 10 ** 12."""

    def thing() -> str:
        return f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}"

    place = f"{random.choice(_PLACES)} {thing()}"
    form = random.randrange(4)
    if form == 0:
        return f"The {thing()} {random.choice(VERBS)} the {thing()} {place}."
    if form == 1:
        return f"{random.choice(_TIMES)} the {thing()} {random.choice(VERBS)} the {thing()}."
    if form == 2:
        return f"There stands one {random.choice(NOUNS)} {place}, and the {random.choice(NOUNS)} {random.choice(VERBS)} it."
    return f"Nobody who {random.choice(VERBS)} the {random.choice(NOUNS)} {random.choice(VERBS)} the {thing()} {place}."


def name(random: Random) -> str:
    """Make a name of an adjective and a noun, as "brave-lantern"."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"
