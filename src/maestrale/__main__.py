from maestrale.cli import main

main()
