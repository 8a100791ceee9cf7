"""A certificate authority for one fleet: boards and those who speak to them know each other by it.

`certificates` says what is in a certificate, `index` what was issued, `authority` does both in a folder.
"""
