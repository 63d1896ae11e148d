package scenario

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/reflect/protoreflect"

	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
)

// eventRow is a row of the catalogue in docs/events.md: type, payload.
var eventRow = regexp.MustCompile("(?m)^\\| `([a-z-]+\\.(?:[a-z-]+|<kind>))` \\| `([A-Za-z]+)` \\|")

// catalogue is docs/events.md: payload by type.
func catalogue(t *testing.T) map[string]string {
	t.Helper()
	page, err := os.ReadFile("../../docs/events.md")
	require.NoError(t, err)
	rows := map[string]string{}
	for _, m := range eventRow.FindAllStringSubmatch(string(page), -1) {
		require.NotContains(t, rows, m[1], "twice in docs/events.md")
		rows[m[1]] = m[2]
	}
	return rows
}

// A message of the package is a payload unless another message of it has it as a field.
func payloads() (names []string) {
	messages := eventsv1.File_landfall_events_v1_events_proto.Messages()
	var parts []protoreflect.FullName
	for i := range messages.Len() {
		for k := range messages.Get(i).Fields().Len() {
			if m := messages.Get(i).Fields().Get(k).Message(); m != nil {
				parts = append(parts, m.FullName())
			}
		}
	}
	for i := range messages.Len() {
		if m := messages.Get(i); !slices.Contains(parts, m.FullName()) {
			names = append(names, string(m.Name()))
		}
	}
	return names
}

// Every event message is in the catalogue, and the catalogue has nothing else.
func TestEveryEventIsDocumented(t *testing.T) {
	var documented []string
	for _, payload := range catalogue(t) {
		if !slices.Contains(documented, payload) { // two facts may have one payload
			documented = append(documented, payload)
		}
	}
	require.ElementsMatch(t, payloads(), documented)
}

// published is how services name the type of an event next to its payload.
var published = regexp.MustCompile(`(?s)"([a-z]+(?:-[a-z]+)*\.[a-z]+(?:-[a-z]+)*)",[^{}]{0,200}?&eventsv1\.([A-Za-z]+)\{`)

// Every type that the services' sources publish is in the catalogue with its payload, and the other way round.
func TestEveryPublishedTypeIsDocumented(t *testing.T) {
	rows := catalogue(t)
	found := map[string]bool{}
	err := filepath.WalkDir("../../services", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range published.FindAllStringSubmatch(string(source), -1) {
			require.Equal(t, m[2], rows[m[1]], "%s publishes %s with payload %s; docs/events.md has %q", path, m[1], m[2], rows[m[1]])
			found[m[1]] = true
		}
		return nil
	})
	require.NoError(t, err)
	for name := range rows {
		if strings.Contains(name, "<kind>") {
			continue // published by libs/bus
		}
		require.True(t, found[name], "nobody publishes %s", name)
	}
}
