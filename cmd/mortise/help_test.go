package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestExamples: every verb of the key server shows how it is typed, and what it
// shows can be typed: the verb exists, takes so many arguments, and has the flags.
func TestExamples(t *testing.T) {
	verbs, lines := 0, 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if c.Name() == "help" || c.Name() == "completion" || c.Hidden {
			return
		}
		verbs++
		if c.Short == "" || c.Example == "" && c.Name() != "kms" {
			t.Errorf("%s: no short description, or no example", c.CommandPath())
		}
		for _, line := range strings.Split(c.Example, "\n") {
			for _, typed := range typedIn(line) {
				lines++
				root := &cobra.Command{Use: "mortise"}
				root.AddCommand(kmsCommand())
				found, rest, err := root.Find(typed)
				if err != nil || found == root || found.Name() == "kms" {
					t.Errorf("%s: %q: no such verb: %v", c.CommandPath(), line, err)
					continue
				}
				if err := found.ParseFlags(rest); err != nil {
					t.Errorf("%s: %q: %v", c.CommandPath(), line, err)
					continue
				}
				if err := found.ValidateArgs(found.Flags().Args()); err != nil {
					t.Errorf("%s: %q: %v", c.CommandPath(), line, err)
				}
			}
		}
	}
	walk(kmsCommand())
	if verbs < 40 || lines < 50 {
		t.Errorf("only %d verbs, %d examples", verbs, lines)
	}
}

// typedIn takes the words after mortise of each command of ours in a line of a
// shell: up to a pipe, a redirection or a remark, which has many blanks before it.
func typedIn(line string) (list [][]string) {
	line = strings.TrimSuffix(strings.TrimSpace(line), "\\")
	if at := strings.Index(line, "     "); at > 0 {
		line = line[:at]
	}
	for _, part := range strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune("|;&<>#()$", r) }) {
		words := quoted(part)
		for i, w := range words {
			if w == "mortise" && i <= 1 {
				list = append(list, words[i+1:])
			}
		}
	}
	return list
}

// quoted splits at blanks that are in no quotes.
func quoted(s string) (words []string) {
	inside := false
	return strings.FieldsFunc(s, func(r rune) bool {
		if r == '"' || r == '\'' {
			inside = !inside
			return true
		}
		return r == ' ' && !inside
	})
}
