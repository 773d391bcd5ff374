"""Steered models inside other programs: each module here needs the program that it is for, and nothing else imports it."""
