"""Simple English stories from a small grammar. Knows nothing about chat, tasks or tokens.

`story(rng)` writes one story of 5 to 12 sentences whose names, places and things stay the same from beginning to end,
so that a model trained on them learns to keep a thread, and a reader sees at once whether it lost it.
"""

from dataclasses import dataclass
from random import Random

from examples.tiny_model.words import ANIMALS, COLOURS, NAMES

_HOMES = [
    "in a small house near the forest",
    "in a green valley",
    "at the edge of a quiet lake",
    "on a little farm",
    "in a town by the sea",
    "under an old oak tree",
    "on top of a hill",
    "in a village with a white bridge",
]
_TRAITS = ["kind", "brave", "curious", "clever", "shy", "cheerful", "gentle", "busy", "quiet", "playful"]
_SIZES = ["little", "small", "young", "tiny", "big"]
_THINGS = ["ball", "kite", "book", "hat", "bell", "drum", "boat", "lamp", "scarf", "key", "basket", "flute", "ring"]
_PLACES = ["the forest", "the river", "the market", "the old mill", "the garden", "the beach", "the meadow", "the hill"]
_FOODS = ["apple", "pear", "cake", "carrot", "honey", "bread", "soup", "berry pie", "cheese"]
_WEATHER = [
    "The sun was shining and the sky was blue.",
    "A soft rain was falling.",
    "The wind was cold and the leaves were falling.",
    "It was a warm morning and the birds were singing.",
    "Snow lay on the ground.",
    "There was not a cloud in the sky.",
]
_OPENINGS = ["Once upon a time", "Once upon a time", "Once upon a time", "Long ago", "A long time ago", "One day"]
_ENDINGS = [
    "And they lived happily ever after.",
    "From that day on, they were the best of friends.",
    "It was the best day of all.",
    "And that night everyone slept very well.",
    "They never forgot that day.",
    "And they all laughed together.",
]
_SEARCHES = [
    ("under the bed", "behind the door"),
    ("in the kitchen", "in the garden"),
    ("by the river", "under the bridge"),
    ("behind the house", "in the tall grass"),
]


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what one story is about."""

    hero: str
    kind: str
    friend: str
    friend_kind: str
    thing: str
    place: str
    food: str
    trait: str


def draw_cast(rng: Random, kind: str | None = None, name: str | None = None) -> Cast:
    """Draws two different names and kinds, and one of everything else; `kind` and `name` fix the hero's."""
    hero, friend = rng.sample(NAMES, 2)
    own_kind, friend_kind = rng.sample([*ANIMALS, "girl", "boy"], 2)
    if kind is not None:
        own_kind, friend_kind = kind, friend_kind if friend_kind != kind else own_kind
    if name is not None:
        hero, friend = name, friend if friend != name else hero
    return Cast(
        hero,
        own_kind,
        friend,
        friend_kind,
        f"{rng.choice(COLOURS)} {rng.choice(_THINGS)}",
        rng.choice(_PLACES),
        rng.choice(_FOODS),
        rng.choice(_TRAITS),
    )


def article(word: str) -> str:
    """`word` with "a" or "an" before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def story(rng: Random, cast: Cast | None = None) -> str:
    """One whole story, without a title, in one paragraph or two."""
    cast = cast or draw_cast(rng)
    plot = rng.choice([_lost, _helped, _shared, _afraid, _learned, _walked])
    sentences = [*_opening(rng, cast), *plot(rng, cast), rng.choice(_ENDINGS)]
    if rng.random() < 0.3:
        cut = rng.randint(2, len(sentences) - 2)
        return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])
    return " ".join(sentences)


def _opening(rng: Random, cast: Cast) -> list[str]:
    who = article(f"{rng.choice(_SIZES)} {cast.kind}")
    start, home = rng.choice(_OPENINGS), rng.choice(_HOMES)
    if start == "One day":
        first = f"One day, {who} named {cast.hero} woke up early {home}."
    else:
        first = rng.choice(
            [
                f"{start}, there was {who} named {cast.hero}. {cast.hero} lived {home}.",
                f"{start} there lived {who} {home}. The name of the {cast.kind} was {cast.hero}.",
                f"{start}, {home}, there was {who} called {cast.hero}.",
            ]
        )
    lines = [first, f"{cast.hero} was very {cast.trait}."]
    if rng.random() < 0.6:
        lines.append(rng.choice(_WEATHER))
    return lines


def _lost(rng: Random, cast: Cast) -> list[str]:
    first, second = rng.choice(_SEARCHES)
    return [
        f"{cast.hero} had {article(cast.thing)} and loved it very much.",
        f"One morning, the {cast.thing} was gone.",
        f"{cast.hero} looked {first}, but it was not there.",
        f"{cast.hero} looked {second}, but it was not there.",
        f'"Do not cry," said {cast.friend} the {cast.friend_kind}. "I will help you."',
        f"Together they went to {cast.place}.",
        f"There they found the {cast.thing}.",
        rng.choice([f'"Thank you, {cast.friend}!" said {cast.hero}.', f"{cast.hero} was so happy again."]),
    ]


def _helped(rng: Random, cast: Cast) -> list[str]:
    trouble = rng.choice(["had fallen into a hole", "could not find the way home", "was stuck in the mud", "was ill"])
    return [
        f"One day, {cast.hero} went to {cast.place}.",
        f"There {cast.hero} met {article(cast.friend_kind)} named {cast.friend}.",
        f"{cast.friend} {trouble}.",
        f'"Please help me," said {cast.friend}.',
        f"{cast.hero} wanted to help and worked all day.",
        f"In the evening, {cast.friend} was safe.",
        f"{cast.friend} gave {cast.hero} {article(cast.thing)} to say thank you.",
    ]


def _shared(rng: Random, cast: Cast) -> list[str]:
    return [
        f"One day, {cast.hero} had some {cast.food} for lunch.",
        f"{cast.friend} the {cast.friend_kind} came by and was hungry.",
        f'"May I have some {cast.food}?" asked {cast.friend}.',
        rng.choice(["At first there was not enough for two.", f"{cast.hero} thought about it for a while."]),
        f'Then {cast.hero} said, "Yes, let us share."',
        f"So they sat down near {cast.place} and ate the {cast.food} together.",
        f"It tasted better than ever, and {cast.friend} smiled.",
    ]


def _afraid(rng: Random, cast: Cast) -> list[str]:
    fear = rng.choice(["the dark", "deep water", "loud noises", "the storm"])
    return [
        f"But {cast.hero} was afraid of {fear}.",
        f"One night, {cast.friend} the {cast.friend_kind} was alone at {cast.place}.",
        f'"Who will bring me home?" called {cast.friend}.',
        f"{cast.hero} was still afraid of {fear}, but went out all the same.",
        f"{cast.hero} held the {cast.thing} and walked step by step to {cast.place}.",
        f"{cast.friend} was very glad.",
        f"After that night, {cast.hero} was not afraid of {fear} any more.",
    ]


def _learned(rng: Random, cast: Cast) -> list[str]:
    skill = rng.choice(["swim", "sing", "read", "dance", "bake bread", "fly a kite", "ride a bike"])
    return [
        f"{cast.hero} wanted to learn to {skill}.",
        f'"It is too hard," said {cast.hero}.',
        f'"Try again," said {cast.friend} the {cast.friend_kind}.',
        f"So {cast.hero} tried on Monday, and on Tuesday, and on Wednesday.",
        rng.choice([f"Every day {cast.hero} got a little better.", "It was hard work, but it was fun."]),
        f"On Sunday, {cast.hero} could {skill}.",
        f"Everyone at {cast.place} clapped, and {cast.friend} was proud.",
    ]


def _walked(rng: Random, cast: Cast) -> list[str]:
    return [
        f"One day, {cast.hero} and {cast.friend} the {cast.friend_kind} went for a walk to {cast.place}.",
        f"They took some {cast.food} and {article(cast.thing)} with them.",
        rng.choice(["On the way they sang a song.", "On the way they counted the birds."]),
        f"At {cast.place} they played with the {cast.thing} until they were tired.",
        f"Then they ate the {cast.food} and watched the clouds.",
        f"When the sun went down, {cast.hero} and {cast.friend} walked home.",
    ]
