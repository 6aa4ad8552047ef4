"""What every room may need: errors as sentences, files, the hub, processes, versions.

May import: nothing of this package.
"""
