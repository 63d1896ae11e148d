package scenario

import (
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// advised is a command in the text of an error's action; it ends where the sentence goes on.
var advised = regexp.MustCompile("`?landfall( [a-z-]+)+( --?[a-z][a-z-]*| [A-Z]+)*`?")

// Every command that an error advises is one that this command line has, with the flags that are named.
func TestAdviceNamesCommands(t *testing.T) {
	l := newLab(t)
	known := map[string]bool{}
	for reason := range typesv1.ErrorReason_name {
		entry, ok := errcat.Lookup(typesv1.ErrorReason(reason))
		if !ok {
			continue
		}
		for _, text := range advised.FindAllString(entry.Action, -1) {
			if !strings.HasPrefix(text, "`") && !strings.Contains(text, " VM") {
				continue // a sentence about Landfall
			}
			words := strings.Fields(strings.Trim(text, "`"))[1:]
			if known[text] || words[0] == "up" {
				continue
			}
			known[text] = true
			r := l.run(append(words, "--help")...)
			require.Zero(t, r.code, "%s advises %s: %s", typesv1.ErrorReason(reason), text, r.err)
			require.Contains(t, r.out, "Usage:\n  landfall "+words[0], "%s advises %s", typesv1.ErrorReason(reason), text)
			for i, w := range words[1:] {
				if strings.ToLower(w) != w || strings.HasPrefix(w, "-") {
					break
				}
				require.Contains(t, r.out, "Usage:\n  landfall "+strings.Join(words[:i+2], " "), "%s advises %s", typesv1.ErrorReason(reason), text)
			}
		}
	}
	require.Greater(t, len(known), 10)
}
