"""`python -m kscli`: the command line."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the entry point of `kscli`."""
    from kscli.cli.app import main as run_app

    run_app()


if __name__ == "__main__":
    main()
