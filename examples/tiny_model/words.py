"""Word lists that stories and tasks draw from. Knows nothing about tasks, chat or tokens."""


def _words(text: str) -> list[str]:
    return text.split()


COLOURS = _words(
    """
    red blue green yellow orange purple pink brown black white grey golden silver
    """
)
ANIMALS = _words(
    """
    cat dog fox rabbit bear mouse owl duck frog horse cow pig hen goat sheep lion tiger monkey elephant
    hedgehog squirrel turtle penguin wolf deer bee ant fish snail swan crow robin beaver badger otter
    """
)
FRUITS = _words(
    """
    apple pear plum cherry grape lemon peach banana melon mango fig orange kiwi berry olive tomato carrot
    onion potato bean pea corn nut date lime
    """
)
OBJECTS = _words(
    """
    ball book cup hat kite lamp key box boat bell drum coin map rope spoon chair table clock candle basket
    blanket button bottle brush pencil paper ribbon stone shell feather ring scarf shoe sock mirror ladder
    wheel window door flute toy train car bike bag plate fork knife bowl
    """
)
NATURE = _words(
    """
    tree river hill lake sun moon star cloud rain snow wind leaf flower rose tulip grass forest garden beach
    sea sand mountain valley field meadow pond storm sky island cave bridge road path
    """
)
NUMBER_WORDS = _words(
    """
    zero one two three four five six seven eight nine ten eleven twelve
    """
)
VERBS = _words(
    """
    run jump sing dance sleep read write draw paint swim climb walk talk laugh smile cook bake plant build
    carry open close push pull throw catch hide seek find lose
    """
)
ADJECTIVES = _words(
    """
    big small tall short old young new happy sad brave shy kind clever quiet loud fast slow warm cold soft
    hard bright dark sweet round light heavy clean dusty
    """
)
NAMES = _words(
    """
    Anna Ben Clara David Emma Finn Grace Henry Ivy Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina Tom Lily
    Max Nora Oscar Ruby Theo Zoe Hugo Ella Felix Alice Bob Carol Dan Eve Frank Gina Hans Ida Jim
    """
)
CITIES = _words(
    """
    Paris London Rome Berlin Madrid Vienna Oslo Cairo Tokyo Delhi Lima Athens Dublin Prague Warsaw Lisbon Bern
    Helsinki Stockholm Boston Chicago Toronto Sydney Beijing Seoul Moscow Nairobi Havana Amsterdam Brussels
    """
)

EVERYDAY = sorted({*COLOURS, *ANIMALS, *FRUITS, *OBJECTS, *NATURE, *NUMBER_WORDS, *VERBS, *ADJECTIVES})
"""Every lower-case word above, once, in a fixed order: what copying and look-up draw from."""

HAN = (
    "你好世界天地人大小上下中国水火木金土日月山川风雨雪花草树鸟鱼马牛羊猫狗虎龙东南西"
    "北春夏秋冬红黄蓝白黑一二三四五六七八九十爱家学生书文字心手口目耳头"
)
KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわん"
CYRILLIC = "абвгдежзиклмнопрстуфхцчшыэюя"
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
ACCENTED = "àáâäãåæçèéêëìíîïñòóôöõøùúûüýÿßœ"
EMOJI = [
    *"😀😃😄😁😆😅😂🙂😉😊😍😘😎🤔😢😭😡👍👎👏🙏💪🐱🐶🦊🐻🐼🐸🐵🐔🐧🐦🐟🐝🌳🌷🌹🌞🌙🌈🔥🍎🍐🍋🍌🍇🍓🍰🚗🚲🚀⏰🎈🎁🎉🎵🏠",
    "❤️",
    "☀️",
    "👩‍🚀",
    "👨‍👩‍👧",
    "👍🏽",
    "🇫🇷",
    "🇯🇵",
]
