"""``optimum-cli lowbit``: the same commands as ``hf-lowbit``.

Installed as ``optimum/commands/register/register_lowbit.py``, a namespace package in which optimum looks for commands.
Nothing is declared twice: whatever follows ``lowbit`` goes to :mod:`hf_lowbit.cli` as it is, ``--help`` included.
"""

from argparse import REMAINDER

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LowBitCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="lowbit", help="Any Hugging Face model in 1 to 8 bits (hf_lowbit).")

    @staticmethod
    def parse_args(parser):
        parser.prefix_chars = ""  # no argument is an option of this parser, not even -h
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self):
        from hf_lowbit.cli import app

        app(self.args.arguments, prog_name="optimum-cli lowbit")


REGISTER_COMMANDS = [LowBitCommand]
