package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

var protoJSON = protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}

// print writes a message in the chosen format; table renders the table form.
func (a *app) print(m proto.Message, table func(w io.Writer)) error {
	switch a.format {
	case "json", "yaml":
		raw, err := protoJSON.Marshal(m)
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		var v any
		if err := json.Unmarshal(raw, &v); err != nil { // protojson varies its white space on purpose
			return fmt.Errorf("encode output: %w", err)
		}
		return a.printValue(v)
	default:
		w := tabwriter.NewWriter(a.out, 0, 4, 2, ' ', 0)
		table(w)
		return w.Flush()
	}
}

// printValue writes a plain value as JSON or YAML.
func (a *app) printValue(v any) error {
	if a.format == "yaml" {
		enc := yaml.NewEncoder(a.out)
		enc.SetIndent(2)
		if err := enc.Encode(v); err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		return enc.Close()
	}
	enc := json.NewEncoder(a.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func row(w io.Writer, cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprint(w, c)
	}
	fmt.Fprintln(w)
}

// human prints bytes with a binary unit.
func human(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n), -1
	for f >= unit && i < 5 {
		f /= unit
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTPE"[i])
}

func stamp(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().Local().Format("2006-01-02 15:04:05.000")
}

func span(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return d.AsDuration().Round(100 * time.Millisecond).String()
}

// label turns an enum value such as PROTECTION_STATE_PAUSED into "paused".
func label(e fmt.Stringer, prefix string) string {
	s := strings.TrimPrefix(e.String(), prefix)
	if s == "UNSPECIFIED" {
		return "-"
	}
	return strings.ToLower(strings.ReplaceAll(s, "_", " "))
}

func stateLabel(s typesv1.ProtectionState) string { return label(s, "PROTECTION_STATE_") }

// last is the last part of a resource name.
func last(name string) string { return name[strings.LastIndex(name, "/")+1:] }

// explainDetail prints an error that came inside a resource.
func explainDetail(w io.Writer, e *typesv1.ErrorDetail) {
	fmt.Fprintf(w, "what happened: %s\nreason:        %s\nlikely cause:  %s\nwhat to do:    %s\n", e.What, e.Reason, e.Cause, e.Action)
}
