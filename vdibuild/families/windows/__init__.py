"""Windows 10 and 11: installed by their own Setup, which an answer file tells everything.

answers.py renders what Setup and sysprep read, medium.py writes it to a CD-ROM, command.py says how
virt-install makes the machine that installs.
"""
