#!/bin/sh
# What a newcomer sees first: one picture, a few questions, the answers of the built-in model.
# usage: demo.sh PATH_TO_EDGEVLM
set -eu
edgevlm=$1
picture=$(dirname "$0")/panel.jpg

ask() {
    printf '$ edgevlm ask "%s" -i %s\n' "$1" "$picture"
    "$edgevlm" ask "$1" -i "$picture"
}

ask "What does the display read?"
ask "What does the gauge show?"
ask "Which lamps are on?"
ask "Is the green lamp on?"
ask "Describe the panel."
