package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// maxDocument bounds a file that says what a resource is to be.
const maxDocument = 1 << 20

// readDocument reads a YAML or JSON file, - being standard input, and hands its value to take. What cannot be read is INVALID_ARGUMENT;
// what makes no sense has the given reason. Both name where it came from.
func (a *app) readDocument(kind, file string, wrong typesv1.ErrorReason, take func(v any) error) error {
	from := kind + " file " + file
	r := a.in
	if file == "-" {
		from = kind + " from standard input"
	} else {
		f, err := os.Open(file)
		if err != nil {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "read %s", from)
		}
		defer f.Close()
		r = f
	}
	raw, err := io.ReadAll(io.LimitReader(r, maxDocument))
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, err, "read %s", from)
	}
	var v any
	if err = yaml.Unmarshal(raw, &v); err == nil { // YAML is a superset of JSON
		err = take(v)
	}
	if err != nil {
		return errcat.Wrap(wrong, err, "%s", from)
	}
	return nil
}

// protoPrefix is what the decoder says before what is wrong: its name, a space that varies on purpose, and a place in
// JSON that nobody wrote.
var protoPrefix = regexp.MustCompile(`^proto:[\s\x{a0}]*(\(line \d+:\d+\): )?`)

// intoMessage fills a message from keys and values, which values first turns into what proto-JSON wants. Unknown keys are refused
// with their name; example is a line that would be right.
func intoMessage(v any, example string, values func(map[string]any) error, into proto.Message) error {
	m, ok := v.(map[string]any)
	if !ok {
		return fmt.Errorf("it is not a list of keys and values such as %s", example)
	}
	if err := values(m); err != nil {
		return err
	}
	j, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(j, into); err != nil {
		return errors.New(protoPrefix.ReplaceAllString(err.Error(), ""))
	}
	return nil
}
