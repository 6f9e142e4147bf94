"""`python -m peft_engine`: the same as the command `peft-engine`."""

from peft_engine.cli import main

if __name__ == "__main__":
    main()
