"""Prompt lookup by trying every earlier place: the oracle of drafts, on the host and on the device."""


def search(tokens: list[int], most: int, candidates: int | None = None) -> list[int]:
    """The longest agreement of two tokens to sixteen, the latest of equals. candidates: places, from the last on."""
    end, best, at = len(tokens), 1, None
    places = [p for p in range(2, end) if tokens[p - 2 : p] == tokens[end - 2 :]]
    for place in places[::-1][:candidates]:
        length = 0
        while length < min(place, 16) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        if length > best:
            best, at = length, place
    if at is None:
        return []
    repeated = list(tokens)
    while len(repeated) < at + most:
        repeated.append(repeated[len(repeated) - end + at])
    return repeated[at : at + most]
