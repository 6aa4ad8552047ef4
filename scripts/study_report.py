"""Stand-in."""


def write_report(place, lines):
    return ""
