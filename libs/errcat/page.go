package errcat

import (
	"fmt"
	"slices"
	"strings"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Page returns docs/errors.md, made from the catalogue; reasons stand in the order of their numbers.
func Page() string {
	var b strings.Builder
	b.WriteString(`# Errors

<!-- Generated from libs/errcat by "go test ./libs/errcat -update". Do not edit. -->

Every error that Landfall shows has a reason code, which is part of the contract and never changes its
meaning. On the wire it is ` + "`google.rpc.ErrorInfo.reason`" + ` with domain ` + "`" + Domain + "`" + `. "Passing" says
whether the same call may succeed later without anybody changing anything.

| reason | gRPC code | passing |
| --- | --- | --- |
`)
	reasons := make([]typesv1.ErrorReason, 0, len(catalogue))
	for r := range catalogue {
		reasons = append(reasons, r)
	}
	slices.Sort(reasons)
	for _, r := range reasons {
		e := catalogue[r]
		passing := "no"
		if e.Recoverable {
			passing = "yes"
		}
		name := Code(r)
		fmt.Fprintf(&b, "| [%s](#%s) | %s | %s |\n", name, strings.ToLower(name), e.Code, passing)
	}
	for _, r := range reasons {
		e := catalogue[r]
		fmt.Fprintf(&b, "\n## %s\n\n**Likely cause.** %s\n\n**What to do.** %s\n", Code(r), e.Cause, e.Action)
		if e.RetryAfter > 0 {
			fmt.Fprintf(&b, "\nClients are asked to wait %s before they try again.\n", e.RetryAfter)
		}
	}
	return b.String()
}
