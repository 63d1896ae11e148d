package nbd

import (
	"context"
	"fmt"
	"os"
	"testing"
)

func TestZZ(t *testing.T) {
	u := os.Getenv("ZZ")
	if u == "" {
		t.Skip()
	}
	for _, df := range []bool{true, false} {
		c, err := Dial(context.Background(), u)
		if err != nil {
			t.Fatal(err)
		}
		if !df {
			c.info.flags &^= exportDF
		}
		for at := int64(0); at < 8; at++ {
			p := make([]byte, mib)
			if err := c.ReadAt(context.Background(), p, at*mib); err != nil {
				t.Fatal(err)
			}
			bad := 0
			first := -1
			for i, b := range p {
				if b != 7 {
					bad++
					if first < 0 {
						first = i
					}
				}
			}
			fmt.Println("df", df, "at", at, "bad", bad, "first", first)
		}
		c.Close()
	}
}
