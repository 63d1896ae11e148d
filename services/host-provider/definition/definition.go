// Package definition reads what people write to describe a machine: YAML, taken strictly. What a definition says is each
// driver's own.
package definition

import (
	"bytes"
	"errors"
	"io"
	"regexp"

	"go.yaml.in/yaml/v3"
)

// Errors of Decode; the drivers say them in words, with the name of the file.
var (
	// ErrEmpty: there is nothing in it.
	ErrEmpty = errors.New("definition is empty")
	// ErrMore: a second document follows, which would be ignored. The first one was decoded.
	ErrMore = errors.New("definition has more than one document")
)

// unknownKey is how the parser names a key that no field has, and our Go type, which means nothing to a reader.
var unknownKey = regexp.MustCompile(`field (.+) not found in type .*`)

// Decode decodes a definition into v. Keys that are known are taken in despite values or keys that are wrong: those are
// returned in wrong, one error for each. err is ErrEmpty, ErrMore, or the parser's when nothing could be taken in.
func Decode(raw []byte, v any) (wrong []error, err error) {
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	dec.KnownFields(true)
	var mistyped *yaml.TypeError
	switch err := dec.Decode(v); {
	case errors.Is(err, io.EOF):
		return nil, ErrEmpty
	case errors.As(err, &mistyped):
		for _, text := range mistyped.Errors {
			wrong = append(wrong, errors.New(unknownKey.ReplaceAllString(text, `unknown key "$1"`)))
		}
	case err != nil:
		return nil, err
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return wrong, ErrMore
	}
	return wrong, nil
}
