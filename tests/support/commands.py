"""Running a command in a test."""

from headwise.studies.cli.main import main


def printed(capsys, *arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status
    return capsys.readouterr()


def rows(text):
    """The words of each line below the rule of a table."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("─"))
    return [line.split() for line in lines[start + 1 :]]
