"""The configuration: frozen dataclasses, the parser that fills them, and the upstream names of flags.

Only this package knows the argument parser. Nothing heavy is imported here: --help and --dry_run answer at once.
"""
