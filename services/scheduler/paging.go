package scheduler

import (
	"encoding/base64"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Page sizes of every list.
const (
	defaultPage = 100
	maxPage     = 1000
)

// page cuts one page out of a sorted list. The token names the last item of the page before, by the id that item gives
// it; items may come and go between two pages.
func page[T any](items []T, id func(T) string, after func(item, last string) bool, size int32, token string) ([]T, string, error) {
	n := int(size)
	switch {
	case n <= 0:
		n = defaultPage
	case n > maxPage:
		n = maxPage
	}
	last, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		e := errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "page_token is not one of ours")
		e.Fields = []errcat.Field{{Path: "page_token", Message: "is not one of ours"}}
		return nil, "", e
	}
	out := make([]T, 0, min(n, len(items)))
	for _, it := range items {
		if token != "" && !after(id(it), string(last)) {
			continue
		}
		if len(out) == n {
			return out, base64.RawURLEncoding.EncodeToString([]byte(id(out[n-1]))), nil
		}
		out = append(out, it)
	}
	return out, "", nil
}

func ascending(item, last string) bool  { return item > last }
func descending(item, last string) bool { return item < last }
