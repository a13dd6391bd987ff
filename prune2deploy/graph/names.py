"""Names that are not in use."""


def fresh(wanted: str, taken: set[str]) -> str:
    """Return the wanted name, with a number behind it where it is taken, and take it."""
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name
