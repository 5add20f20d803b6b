from lmx.cli import main

main()
