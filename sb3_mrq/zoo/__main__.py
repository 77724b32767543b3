from sb3_mrq.command_line import main

if __name__ == "__main__":
    main()
